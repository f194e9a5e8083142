"""LoRA's short forward pass gives what PEFT's own gives."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from fourfold.models.lora import LoraLinear, use_short_forward

_SIZE = 16


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(_SIZE, _SIZE)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def adapted(base: torch.dtype) -> PeftModel:
    """A linear layer in `base` with an adapter in fp32 that changes something."""
    torch.manual_seed(0)
    model = get_peft_model(_Layer().to(base), LoraConfig(r=4, target_modules=["proj"]), autocast_adapter_dtype=False)  # type: ignore[arg-type]
    assert isinstance(model, PeftModel)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape)
    return model


@pytest.mark.parametrize("num_tokens", [5, 80])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_short_forward_when_compared_with_peft_gives_the_same(
    base: torch.dtype, autocast: bool, num_tokens: int
) -> None:
    theirs = adapted(base)
    ours = copy.deepcopy(theirs)
    assert use_short_forward(ours) == 1
    x = torch.randn(2, num_tokens, _SIZE, dtype=base)
    found: list[tuple[Tensor, list[Tensor]]] = []
    for model in (theirs, ours):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(x)
        out.float().square().sum().backward()
        found.append((out.detach(), [p.grad for p in model.parameters() if p.grad is not None]))
    assert isinstance(ours.base_model.model.proj, LoraLinear)  # type: ignore[union-attr]
    (expected, grads), (out, other_grads) = found
    assert out.dtype == expected.dtype
    # relative to the largest value: two roundings to bf16, or fp32 sums in another order
    tolerance = 2e-2 if autocast or base is torch.bfloat16 else 1e-5
    assert len(grads) == len(other_grads) == 2
    for one, other in zip([expected, *grads], [out, *other_grads], strict=True):
        assert float((one - other).abs().max()) <= tolerance * float(one.abs().max())
