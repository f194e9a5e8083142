"""Checkpoints that see as well: their language model trains as one by itself, and is saved as a part of the whole."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel

from command import run_here
from composite_models import COMPOSITES, save_composite, text_logits
from fourfold.config.load import load
from fourfold.config.model import ModelConfig
from fourfold.models.adapters import attach
from fourfold.models.forward import supports_packing
from fourfold.models.load import load_model
from training_runs import losses, run, write_dataset

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # of PEFT's own call

IDS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and a checkpoint of each type."""
    folder = tmp_path_factory.mktemp("composite")
    write_dataset(folder / "data")
    for model_type in COMPOSITES:
        save_composite(folder / model_type, model_type)
    return folder


def whole(folder: Path) -> PreTrainedModel:
    """As Transformers loads it."""
    return AutoModelForImageTextToText.from_pretrained(folder).eval()


def alone(folder: Path, **keys: Any) -> Tensor:
    """Logits of what Fourfold makes of a checkpoint, with an adapter if one is named."""
    keys = {"model_name_or_path": str(folder), "dataset": "d", "output_dir": "o", **keys}
    config = load(keys, verb="train")
    model = load_model(config.model, dtype=torch.float32, device=torch.device("cpu"))
    with torch.no_grad():
        return attach(model, config.model, config.tuning, trainable=False)(input_ids=IDS).logits


@pytest.mark.parametrize("model_type", COMPOSITES)
def test_logits_of_the_language_model_are_those_of_the_whole(model_type: str, folder: Path) -> None:
    found, expected = alone(folder / model_type), text_logits(whole(folder / model_type), IDS)
    assert float((found - expected).abs().max()) <= 1e-6 * float(expected.abs().max())


@pytest.mark.parametrize("model_type", COMPOSITES)
def test_adapter_when_trained_is_loaded_beside_the_whole_and_here(
    model_type: str, folder: Path, tmp_path: Path
) -> None:
    run(folder / model_type, folder / "data", tmp_path, max_steps=4)
    model = whole(folder / model_type)
    before = text_logits(model, IDS)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of keys that are missing, or not used
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys")  # PEFT looks among modules alone
        tuned = PeftModel.from_pretrained(model, str(tmp_path)).eval()
    expected = text_logits(tuned, IDS)
    assert float((expected - before).abs().max()) > 1e-3
    assert not any("vis" in name for name, _ in tuned.named_parameters() if "lora_" in name)
    found = alone(folder / model_type, adapter_name_or_path=str(tmp_path))
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("model_type", ["gemma3", "qwen3_5"])
@pytest.mark.parametrize("targets", ["listed", "by pattern"])
def test_adapter_when_made_for_the_whole_is_used(model_type: str, targets: str, folder: Path, tmp_path: Path) -> None:
    modules: Any = [r"gate_proj", "down_proj"]
    if targets == "by pattern":
        modules = r"model\.language_model\.layers\.\d+\.mlp\.(gate_proj|down_proj)"
    model = get_peft_model(whole(folder / model_type), LoraConfig(r=4, target_modules=modules))  # type: ignore[arg-type]
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(str(tmp_path))
    found = alone(folder / model_type, adapter_name_or_path=str(tmp_path))
    expected = text_logits(model.eval(), IDS)  # type: ignore[arg-type]
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert float((found - alone(folder / model_type)).abs().max()) > 1e-3


@pytest.mark.parametrize("model_type", COMPOSITES)
def test_model_when_tuned_in_full_is_the_whole_with_all_else_as_it_was(
    model_type: str, folder: Path, tmp_path: Path
) -> None:
    run(folder / model_type, folder / "data", tmp_path, max_steps=3, finetuning_type="full", learning_rate=1e-3)
    before, after = whole(folder / model_type), whole(tmp_path)
    assert type(after) is type(before)
    old, new = before.state_dict(), after.state_dict()
    assert old.keys() == new.keys()
    seeing = [name for name in old if "vis" in name or "projector" in name]
    assert seeing
    assert all(torch.equal(old[name], new[name]) for name in seeing)
    found = text_logits(after, IDS)
    assert float((found - text_logits(before, IDS)).abs().max()) > 1e-3
    assert torch.equal(found, alone(tmp_path)) or float((found - alone(tmp_path)).abs().max()) < 1e-5
    assert (tmp_path / "preprocessor_config.json").exists()


@pytest.mark.parametrize("tuning", ["lora", "full", "freeze"])
@pytest.mark.parametrize("model_type", ["gemma3", "qwen3_5"])
def test_run_when_resumed_goes_on_as_it_would_have(model_type: str, tuning: str, folder: Path, tmp_path: Path) -> None:
    keys = {"finetuning_type": tuning, "learning_rate": 1e-3, "save_steps": 2, "freeze_trainable_layers": 1}
    run(folder / model_type, folder / "data", tmp_path / "a", max_steps=4, **keys)
    checkpoint = tmp_path / "a" / "checkpoint-2"
    run(
        folder / model_type,
        folder / "data",
        tmp_path / "b",
        max_steps=4,
        resume_from_checkpoint=str(checkpoint),
        **keys,
    )
    assert losses(tmp_path / "b") == losses(tmp_path / "a")[2:]


@pytest.mark.parametrize("model_type", ["gemma3", "qwen2_5_vl"])
def test_export_when_an_adapter_is_merged_is_the_whole(
    model_type: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(folder / model_type, folder / "data", tmp_path / "adapter", max_steps=4)
    expected = alone(folder / model_type, adapter_name_or_path=str(tmp_path / "adapter"))
    file = tmp_path / "export.yaml"
    words = {
        "model_name_or_path": str(folder / model_type),
        "adapter_name_or_path": str(tmp_path / "adapter"),
        "export_dir": str(tmp_path / "merged"),
        "template": "auto",
    }
    file.write_text(json.dumps(words), encoding="utf-8")
    assert run_here(capsys, "export", file).code == 0
    found = text_logits(whole(tmp_path / "merged"), IDS)
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def test_export_when_a_checkpoint_is_sharded_is_the_whole(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys: dict[str, Any] = {"finetuning_type": "full", "learning_rate": 1e-3, "save_sharded": True, "save_steps": 2}
    run(folder / "gemma3", folder / "data", tmp_path / "run", max_steps=2, **keys)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert not (checkpoint / "model.safetensors").exists()
    file = tmp_path / "export.yaml"
    words = {"model_name_or_path": str(checkpoint), "export_dir": str(tmp_path / "merged"), "template": "auto"}
    file.write_text(json.dumps(words), encoding="utf-8")
    assert run_here(capsys, "export", file).code == 0
    found, expected = (whole(tmp_path / name) for name in ("merged", "run"))
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), expected.parameters(), strict=True))


def test_export_when_the_whole_of_a_sharded_checkpoint_is_gone_is_the_language_model(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(folder / "gemma3", tmp_path / "base")
    keys: dict[str, Any] = {"finetuning_type": "full", "save_sharded": True, "save_steps": 1}
    run(tmp_path / "base", folder / "data", tmp_path / "run", max_steps=1, **keys)
    expected = alone(tmp_path / "run")
    shutil.rmtree(tmp_path / "base")
    assert torch.equal(alone(tmp_path / "run" / "checkpoint-1"), expected)
    assert f"{tmp_path / 'base'}, of which it is a part, cannot be read" in caplog.text


def test_plan_is_that_of_the_language_model(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = load_model(
        ModelConfig(model_name_or_path=str(folder / "gemma3")), dtype=torch.float32, device=torch.device("cpu")
    )
    model.save_pretrained(tmp_path / "alone")
    found: list[str] = []
    for name in (folder / "gemma3", tmp_path / "alone"):
        file = tmp_path / "run.yaml"
        file.write_text(f"model_name_or_path: {name}\nbf16: true\n", encoding="utf-8")
        done = run_here(capsys, "plan", file, "--gpu", "h100", "--gpus", "2", "--json")
        assert done.code == 0
        found.append(json.dumps(json.loads(done.out)).replace(str(name), ""))
    assert found[0] == found[1]


def test_model_whose_language_model_cannot_be_run_alone_is_refused_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "ernie4_5_vl_moe"}), encoding="utf-8")
    with pytest.raises(Exception, match="the language model of a ernie4_5_vl_moe model cannot be run by itself"):
        load_model(ModelConfig(model_name_or_path=str(tmp_path)), dtype=torch.float32, device=torch.device("cpu"))


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_run_of_two_ranks_that_read_their_parts_ends_in_the_whole(tuning: str, folder: Path, tmp_path: Path) -> None:
    """As one process with as many rows a step."""
    keys: dict[str, Any] = {"max_steps": 3, "finetuning_type": tuning, "learning_rate": 1e-3}
    for name, more in (
        ("one", {"per_device_train_batch_size": 4}),
        ("two", {"per_device_train_batch_size": 2, "nproc": 2, "strategy": "fsdp"}),
    ):
        run(folder / "gemma3", folder / "data", tmp_path / name, **keys, **more)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    found = []
    for name in ("one", "two"):
        model: Any = whole(tmp_path / name if tuning == "full" else folder / "gemma3")
        if tuning == "lora":
            model = PeftModel.from_pretrained(model, str(tmp_path / name)).eval()
        found.append(text_logits(model, IDS))
    assert float((found[0] - found[1]).abs().max()) <= 1e-4 * float(found[0].abs().max())


@pytest.mark.parametrize(("chunk", "packed"), [(64, True), (16, False)])
def test_rows_when_layers_attend_within_chunks_are_packed_if_no_document_is_longer(
    chunk: int, packed: bool, folder: Path, tmp_path: Path
) -> None:
    config = json.loads((folder / "llama4" / "config.json").read_text(encoding="utf-8"))
    config["text_config"]["attention_chunk_size"] = chunk
    model = tmp_path / "model"
    shutil.copytree(folder / "llama4", model)
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    found = [
        run(
            model,
            folder / "data",
            tmp_path / attention,
            max_steps=3,
            flash_attn=attention,
            per_device_train_batch_size=8,
        )
        for attention in ("auto", "sdpa")
    ]
    assert found
    assert losses(tmp_path / "auto") == pytest.approx(losses(tmp_path / "sdpa"), rel=1e-5)
    loaded = load_model(ModelConfig(model_name_or_path=str(model)), dtype=torch.float32, device=torch.device("cpu"))
    assert supports_packing(loaded, 64) == packed
