"""4-bit weights that are unpacked once: the numbers of those that are unpacked for each use."""

from __future__ import annotations

import copy

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from fourfold.models.lora import LoraLinear, use_short_forward
from fourfold.models.patches import peft_noise_ignored
from fourfold.models.unpacked import keep_unpacked
from tiny_models import quantize, tiny_model


def _packed_model() -> PeftModel:
    model = tiny_model("llama", hidden_size=64, intermediate_size=128, head_dim=16)
    quantize(model)
    with peft_noise_ignored():
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "up_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    assert isinstance(adapted, PeftModel)
    use_short_forward(adapted)
    return adapted


def _pass(model: PeftModel) -> dict[str, Tensor]:
    """Logits, and gradients by name."""
    model.zero_grad()
    logits = model(input_ids=torch.arange(3, 15)[None]).logits
    logits.float().square().mean().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"": logits.detach(), **found}


def test_model_when_unpacked_gives_the_same_numbers_under_the_same_names() -> None:
    packed = _packed_model()
    model = copy.deepcopy(packed)
    assert keep_unpacked(model) == 14  # seven matrices in each of two layers, adapted or not
    assert keep_unpacked(model) == 0
    assert not [name for name, layer in model.named_modules() if type(layer).__name__ == "Linear4bit"]
    assert sum(isinstance(layer, LoraLinear) for layer in model.modules()) == 8
    expected, found = _pass(packed), _pass(model)
    assert list(found) == list(expected)
    assert len(found) == 1 + 2 * 8
    for name, values in expected.items():
        assert float((found[name] - values).abs().max()) <= 1e-5 * float(values.abs().max()), name
    trained = [name for name, p in packed.named_parameters() if p.requires_grad]
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained
    with packed.disable_adapter(), model.disable_adapter(), torch.no_grad():
        ids = torch.arange(3, 15)[None]
        torch.testing.assert_close(model(input_ids=ids).logits, packed(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
