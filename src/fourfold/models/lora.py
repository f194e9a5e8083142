"""A LoRA linear layer that costs little more than the layer it adapts.

PEFT's layers stay what they are (names, state, merging, saving); only the forward pass of the plain case - one active
adapter, no variant such as DoRA - is replaced by one with fewer passes over the activations.

With base weight W [out, in], A [r, in], B [out, r] and scale s:  y = x W^T + s (x A^T) B^T
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn

_MERGE_TOKENS = 64
"""From so many tokens on, adding s B A to W costs less than two thin products and two passes over the output."""


class _Merged(torch.autograd.Function):
    """y = x (W + s B A)^T, with W + s B A made anew in the backward pass instead of being kept.

    Adding r in*out products to W is r / T of the main product's work for T tokens, and it saves reading and writing
    the [T, out] output twice more. In low precision the sum would lose the small update, so it is for fp32 only.

    With G = dL/dy:  dL/dx = G (W + s B A);  dL/dA = s (G B)^T x;  dL/dB = s G^T (x A^T).
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        """x [T, in], weight [out, in], bias [out] or None, a [r, in], b [out, r] -> [T, out]."""
        ctx.save_for_backward(x, weight, a, b)
        ctx.scale = scale
        return F.linear(x, torch.addmm(weight, b, a, alpha=scale), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """grad [T, out]; the base weight and bias are frozen."""
        x, weight, a, b = ctx.saved_tensors
        grad_x = grad @ torch.addmm(weight, b, a, alpha=ctx.scale) if ctx.needs_input_grad[0] else None
        grad_a = torch.mm((grad @ b).T, x).mul_(ctx.scale)
        grad_b = torch.mm(grad.T, x @ a.T).mul_(ctx.scale)
        return grad_x, None, None, grad_a, grad_b, None


class LoraLinear(PeftLinear):
    """PEFT's LoRA linear with the short forward pass; anything but the plain case goes PEFT's own way."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., in] -> [..., out]."""
        adapter = self._plain_adapter(kwargs)
        if adapter is None or not self._same_dtype(x, adapter):
            return super().forward(x, *args, **kwargs)
        lora_a, lora_b = self.lora_A[adapter], self.lora_B[adapter]
        scale, dropout = self.scaling[adapter], self.lora_dropout[adapter]
        base = self.get_base_layer()
        assert isinstance(lora_a, nn.Linear) and isinstance(lora_b, nn.Linear) and isinstance(base, nn.Linear)
        a, b = lora_a.weight, lora_b.weight
        flat = x.reshape(-1, x.shape[-1])
        no_dropout = isinstance(dropout, nn.Identity) or not self.training
        if no_dropout and _mergeable(flat, base, a):
            out = _Merged.apply(flat, base.weight, base.bias, a, b, scale)
        else:
            low = F.linear(flat if no_dropout else dropout(flat), a)
            out = torch.addmm(F.linear(flat, base.weight, base.bias), low, b.T, alpha=scale)
        assert isinstance(out, Tensor)
        return out.view(*x.shape[:-1], out.shape[-1])

    def _plain_adapter(self, kwargs: dict[str, Any]) -> str | None:
        """The one active adapter if this is the plain case."""
        if kwargs or self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return None
        adapter = self.active_adapters[0]
        plain = adapter in self.lora_A and adapter not in self.lora_variant and not self.lora_bias[adapter]
        return adapter if plain else None

    def _same_dtype(self, x: Tensor, adapter: str) -> bool:
        """Whether the products can be taken as they stand; where nothing casts, PEFT casts what is not of one dtype."""
        if torch.is_autocast_enabled(x.device.type):
            return True
        weight = self.lora_A[adapter].weight
        assert isinstance(weight, Tensor)
        return x.dtype == weight.dtype


def _mergeable(x: Tensor, base: nn.Linear, a: Tensor) -> bool:
    same_dtype = x.dtype == base.weight.dtype == a.dtype == torch.float32
    plain = type(base.weight) is nn.Parameter and not base.weight.requires_grad
    on_cpu = not x.is_cuda and not torch.is_autocast_enabled("cpu")
    return same_dtype and plain and on_cpu and x.shape[0] >= _MERGE_TOKENS


def use_short_forward(model: nn.Module) -> int:
    """Give every plain PEFT LoRA linear of a model the short forward pass.

    Returns:
        how many layers have it now.
    """
    count = 0
    for module in model.modules():
        if type(module) is PeftLinear and type(module.get_base_layer()) is nn.Linear:
            # The class is exchanged, not the object: parameters, hooks and names stay as PEFT made them.
            module.__class__ = LoraLinear
            count += 1
    return count
