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


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_short_forward_when_the_base_is_packed_gives_what_pefts_own_gives(
    compute: torch.dtype, autocast: bool, double: bool
) -> None:
    from bitsandbytes.nn import Linear4bit

    if compute is torch.float32 and autocast:
        pytest.skip("bitsandbytes' layer computes in its own dtype then, and is left alone")
    torch.manual_seed(0)
    size = 128
    plain = nn.Linear(size, size)
    layer = Linear4bit(size, size, compute_dtype=compute, compress_statistics=double, quant_type="nf4")
    layer.load_state_dict(plain.state_dict())
    holder = _Layer()
    holder.proj, holder.is_loaded_in_4bit = layer.to("cpu"), True  # type: ignore[assignment]
    theirs = get_peft_model(holder, LoraConfig(r=4, target_modules=["proj"]), autocast_adapter_dtype=False)  # type: ignore[arg-type]
    adapters = {name: torch.randn(p.shape) for name, p in theirs.named_parameters() if "lora_" in name}
    x = torch.randn(2, 40, size).to(compute)
    found: list[tuple[Tensor, list[Tensor]]] = []
    for short in (False, True):
        assert not short or use_short_forward(theirs) == 1
        for name, parameter in theirs.named_parameters():
            if name in adapters:
                parameter.data, parameter.grad = adapters[name].to(torch.float32 if autocast else compute), None
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = theirs(leaf)
        out.float().square().sum().backward()
        assert leaf.grad is not None
        grads = [p.grad for p in theirs.parameters() if p.grad is not None]
        found.append((out.detach(), [leaf.grad, *grads]))
    assert type(theirs.base_model.model.proj).__name__ == "PackedLoraLinear"  # type: ignore[union-attr]
    (expected, grads), (out, other_grads) = found
    assert out.dtype == expected.dtype
    tolerance = 2e-2 if compute is torch.bfloat16 else 1e-5
    assert len(grads) == len(other_grads) == 3
    for one, other in zip([expected, *grads], [out, *other_grads], strict=True):
        assert float((one - other).abs().max()) <= tolerance * float(one.abs().max())
