"""Every tested model family loads, trains in full and with LoRA, saves, and reloads with equal logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from fourfold.config.model import ModelConfig
from fourfold.config.training import TrainingConfig
from fourfold.config.tuning import TuningConfig
from fourfold.models.adapters import attach, identify_base
from fourfold.models.forward import StepModel, supports_packing
from fourfold.models.groups import parameter_groups
from fourfold.models.load import build_without_weights, load_model
from fourfold.models.patches import peft_noise_ignored
from fourfold.models.tokenizer import load_tokenizer
from fourfold.models.weights import save_model
from tiny_models import (
    EVERY_FAMILY,
    FAMILIES,
    FURTHER_FAMILIES,
    MOE_FAMILIES,
    OTHER_FAMILIES,
    save_tiny_model,
    tiny_config,
    tiny_model,
)
from training_runs import losses, run, write_dataset

CPU = torch.device("cpu")
IDS = (torch.arange(32) * 7 % 350).reshape(2, 16)


@pytest.fixture(params=sorted(FAMILIES | FURTHER_FAMILIES))
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / request.param, request.param)


def _train(model: PreTrainedModel | PeftModel, tuning: TuningConfig) -> list[float]:
    """Two steps of AdamW; returns the losses."""
    optimizer = torch.optim.AdamW(parameter_groups(model, TrainingConfig(learning_rate=1e-2), tuning))
    model.train()
    losses = []
    for _ in range(2):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


@torch.no_grad()
def _logits(model: torch.nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


def test_full_tuning_when_saved_and_reloaded_gives_equal_logits(folder: Path, tmp_path: Path) -> None:
    config, tuning = ModelConfig(model_name_or_path=str(folder)), TuningConfig(finetuning_type="full")
    model = attach(load_model(config, dtype=torch.float32, device=CPU), config, tuning, trainable=True)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert all(name.endswith("e_score_correction_bias") for name in frozen)  # what has no gradient
    losses = _train(model, tuning)
    assert losses[1] < losses[0]
    save_model(model, tmp_path / "saved", tokenizer=load_tokenizer(config))
    again = ModelConfig(model_name_or_path=str(tmp_path / "saved"))
    reloaded = load_model(again, dtype=torch.float32, device=CPU)
    torch.testing.assert_close(_logits(reloaded), _logits(model), rtol=0, atol=0)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved").config.use_cache


def test_lora_when_saved_and_reloaded_gives_equal_logits(folder: Path, tmp_path: Path) -> None:
    config, tuning = ModelConfig(model_name_or_path=str(folder)), TuningConfig(lora_rank=4)
    base = load_model(config, dtype=torch.float32, device=CPU)
    untuned = _logits(base)
    model = attach(base, config, tuning, trainable=True)
    assert isinstance(model, PeftModel)
    torch.testing.assert_close(_logits(model), untuned, rtol=1e-4, atol=1e-5)
    _train(model, tuning)
    tuned = _logits(model)
    assert (tuned - untuned).abs().max() > 1e-2
    adapter = tmp_path / "adapter"
    save_model(model, adapter, base=identify_base(config, tuning))

    with peft_noise_ignored():
        alone = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapter).eval()
    torch.testing.assert_close(_logits(alone), tuned, rtol=0, atol=0)

    again = ModelConfig(model_name_or_path=str(folder), adapter_name_or_path=(str(adapter),))
    reloaded = attach(load_model(again, dtype=torch.float32, device=CPU), again, tuning, trainable=False)
    torch.testing.assert_close(_logits(reloaded), tuned, rtol=0, atol=0)
    assert isinstance(reloaded, PeftModel)
    torch.testing.assert_close(_logits(reloaded.merge_and_unload()), tuned, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_lora_on_a_mixture_model_adapts_the_experts(family: str, tmp_path: Path) -> None:
    config = ModelConfig(model_name_or_path=str(save_tiny_model(tmp_path, family)))
    model = attach(load_model(config, dtype=torch.float32, device=CPU), config, TuningConfig(), trainable=True)
    assert any("experts" in name and parameter.requires_grad for name, parameter in model.named_parameters())


@pytest.mark.parametrize("family", sorted(EVERY_FAMILY))
def test_head_when_there_are_no_weights_is_told_as_with_them(family: str) -> None:
    """A sharded run looks at the head before any weight is read."""
    model = tiny_model(family)
    empty = build_without_weights(tiny_config(family), ModelConfig(), {"dtype": torch.float32})
    found = [StepModel(each, packed=supports_packing(each)) for each in (model, empty)]
    assert found[0].has_plain_head == found[1].has_plain_head


@pytest.mark.parametrize("family", sorted(OTHER_FAMILIES))
def test_other_family_when_sharded_trains_as_one_process(family: str, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / family, family)
    write_dataset(tmp_path / "data")
    keys: dict[str, Any] = {"max_steps": 3, "finetuning_type": "full", "global_batch_size": 4, "learning_rate": 1e-3}
    for name, more in (("one", {}), ("two", {"nproc": 2, "strategy": "fsdp"})):
        run(folder, tmp_path / "data", tmp_path / name, **keys, **more)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
