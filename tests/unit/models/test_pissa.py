from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from fourfold.base.errors import ConfigError
from fourfold.config.tuning import TuningConfig
from fourfold.models import pissa
from fourfold.models.adapters import attach
from fourfold.models.patches import peft_noise_ignored
from fourfold.models.weights import save_model
from tiny_models import Load, Logits


def _attach(load: Load, **keys: object) -> PeftModel:
    model, config = load()
    torch.manual_seed(0)
    tuned = attach(model, config, TuningConfig(pissa_init=True, lora_rank=4, **keys), trainable=True)
    assert isinstance(tuned, PeftModel)
    return tuned


@torch.no_grad()
def _move(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.05


@pytest.mark.parametrize("iterations", [-1, 4])
def test_pissa_starts_at_the_base_model(load: Load, logits: Logits, iterations: int) -> None:
    expected = logits(load()[0])
    tuned = _attach(load, pissa_iter=iterations)
    torch.testing.assert_close(logits(tuned), expected, rtol=1e-4, atol=1e-4)
    trained = [name for name, parameter in tuned.named_parameters() if parameter.requires_grad]
    assert trained
    assert not any(pissa.START in name for name in trained)


@pytest.mark.parametrize("keys", [{"pissa_iter": -1}, {"pissa_iter": 4}, {"pissa_iter": 4, "use_rslora": True}])
def test_pissa_saves_a_plain_adapter_of_the_unchanged_base(
    tmp_path: Path, load: Load, logits: Logits, llama_folder: Path, keys: dict[str, object]
) -> None:
    tuned = _attach(load, **keys)
    _move(tuned)
    expected = logits(tuned.eval())
    save_model(tuned, tmp_path)
    with peft_noise_ignored():
        alone = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama_folder), str(tmp_path)).eval()
    torch.testing.assert_close(logits(alone), expected, rtol=1e-4, atol=1e-4)


def test_restore_puts_the_trained_half_back(tmp_path: Path, load: Load, logits: Logits) -> None:
    tuned = _attach(load)
    _move(tuned)
    save_model(tuned, tmp_path)
    again = _attach(load)
    assert pissa.restore(again, load_file(tmp_path / "adapter_model.safetensors")) == []
    torch.testing.assert_close(logits(again.eval()), logits(tuned.eval()), rtol=0, atol=0)


def test_pissa_with_dora_is_refused(load: Load) -> None:
    with pytest.raises(ConfigError, match="pissa_init: does not go with use_dora"):
        _attach(load, use_dora=True)
