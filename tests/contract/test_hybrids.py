"""Models whose layers carry a state along a row train on packed rows as on padded ones."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from command import run_here
from fourfold.config.load import load
from fourfold.models.adapters import attach
from fourfold.models.document_rows import alike, find_mixers, keep_documents_apart
from fourfold.models.targets import lora_targets
from fourfold.models.unwrap import base_model
from fourfold.planning.read_shape import read_shape
from fourfold.planning.shape import ModelShape
from tiny_models import HYBRIDS, save_tiny_model, tiny_config, tiny_model
from training_runs import losses, run, write_dataset

_FAMILIES = ("lfm2", "qwen3_5_text", "granitemoehybrid")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and a model of each family."""
    folder = tmp_path_factory.mktemp("hybrids")
    write_dataset(folder / "data")
    for family in _FAMILIES:
        save_tiny_model(folder / family, family)
    return folder


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"finetuning_type": "full"},
        {"lora_dropout": 0.1, "neftune_noise_alpha": 5.0},
        {"parallel": {"recompute": "full"}},
        {"parallel": {"recompute": "selective"}},
        {"packing": True, "cutoff_len": 128},
        {"stage": "dpo", "dataset": "tiny_pairs"},
        {"stage": "kto", "dataset": "tiny_tags"},
        {"eval_dataset": "tiny", "eval_strategy": "steps", "eval_steps": 2},
    ],
    ids=["lora", "full", "noise", "recompute", "selective", "packing", "dpo", "kto", "evaluation"],
)
@pytest.mark.parametrize("family", _FAMILIES)
def test_losses_when_packed_are_those_of_padded_rows(
    family: str, options: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    for name, attention in (("packed", "auto"), ("padded", "sdpa")):
        run(
            folder / family,
            folder / "data",
            tmp_path / name,
            flash_attn=attention,
            max_steps=4,
            learning_rate=1e-3,
            **options,
        )
    for key in ("loss", "grad_norm", *(["eval_loss"] if "eval_steps" in options else [])):
        found, expected = losses(tmp_path / "packed", key), losses(tmp_path / "padded", key)
        assert len(expected) >= 2
        assert found == pytest.approx(expected, rel=1e-4)


def test_documents_in_batches_are_at_least_half_as_long_as_the_longest() -> None:
    lengths = (100, 3000, 40, 1600, 1400, 90, 220, 3000)
    batches = alike(lengths)
    assert sorted(number for batch in batches for number in batch) == list(range(len(lengths)))
    assert [[lengths[number] for number in batch] for batch in batches] == [
        [3000, 3000, 1600],
        [1400],
        [220],
        [100, 90, 40],
    ]


@pytest.mark.parametrize("family", sorted(HYBRIDS))
def test_adapters_when_all_are_wanted_are_of_linear_layers_and_experts(family: str) -> None:
    """A convolution's weight has three dimensions as well; its layer reads it past any adapter."""
    targets = lora_targets(tiny_model(family), ("all",))
    assert not any("conv" in name for name in (*targets.modules, *targets.parameters))
    assert bool(targets.parameters) == (family in ("lfm2_moe", "qwen3_5_moe_text", "qwen3_next"))
    with_adapters(family)  # PEFT takes them all


def with_adapters(family: str) -> PeftModel:
    """A model in training mode, with adapters on all that `all` names."""
    keys = {"model_name_or_path": "m", "dataset": "d", "output_dir": "o", "lora_target": "all"}
    run = load(keys, verb="train")
    module = attach(tiny_model(family), run.model, run.tuning, trainable=True, master_dtype=torch.float32)
    assert isinstance(module, PeftModel)
    return module.train()


@pytest.mark.parametrize("family", ["bamba", "granitemoehybrid"])
def test_training_when_a_kernel_would_read_past_the_adapter_goes_without_it(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = with_adapters(family)
    inner = base_model(module)

    def kernel(*_: Any, **__: Any) -> None:
        raise AssertionError("it reads the last matrix without its adapter")

    monkeypatch.setattr(sys.modules[type(inner).__module__], "mamba2_split_conv1d_scan_combined", kernel)
    ids = torch.arange(3, 20)[None]
    with pytest.raises(AssertionError, match="without its adapter"):
        inner(input_ids=ids, use_cache=False)
    keep_documents_apart(inner, None)
    inner(input_ids=ids, use_cache=False).logits.sum().backward()
    [mixer, *_] = find_mixers(inner)
    assert mixer.training
    found = {name: weight.grad for name, weight in mixer.named_parameters() if "out_proj.lora_B" in name}
    assert len(found) == 1
    assert all(grad is not None and grad.abs().max() > 0 for grad in found.values())


@pytest.mark.parametrize("family", sorted(HYBRIDS))
def test_shape_when_read_has_no_experts_that_are_none_and_what_a_state_keeps(family: str) -> None:
    shape = read_shape(tiny_config(family))
    kinds = {weight.kind for layer in shape.kinds for weight in layer.weights if "conv" in weight.name}
    assert "experts" not in kinds
    assert any(layer.state_bytes > 0 for layer in shape.kinds)
    assert any(layer.attends for layer in shape.kinds)
    assert ModelShape.from_json(json.loads(json.dumps(shape.as_json()))) == shape


def test_rehearsal_when_a_layer_carries_a_state_is_near_what_was_predicted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "vocab_size": 2048,
        "linear_key_head_dim": 32,
    }
    model = save_tiny_model(tmp_path / "model", "qwen3_5_text", **sizes, linear_value_head_dim=32)
    file = tmp_path / "run.yaml"
    words = ("finetuning_type: lora", "bf16: true", "cutoff_len: 512", "per_device_train_batch_size: 2")
    file.write_text("\n".join([f"model_name_or_path: {model}", *words]), encoding="utf-8")
    done = run_here(capsys, "rehearse", file, "--gpu", "h100", "--gpus", "1", "--fake", "--json")
    assert done.code == 0, done.err
    [rank] = json.loads(done.out)["ranks"]
    assert rank["predicted_allocated_gib"] == pytest.approx(rank["measured_allocated_gib"], rel=0.15)
