"""A LoRA linear layer that costs little more than the layer it adapts.

PEFT's layers stay what they are (names, state, merging, saving); only the forward pass of the plain case - one active
adapter, no variant such as DoRA - is replaced by one with fewer passes over the activations.

With base weight W [out, in], A [r, in], B [out, r] and scale s:  y = x W^T + s (x A^T) B^T

A base that bitsandbytes has packed into 4 bits is unpacked for each use, and forgotten again.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from fourfold.parallel.packed import PackedWeight, is_plain, state_of, unpack

_OPERATORS = torch.library.Library("fourfold", "DEF")
_OPERATORS.define(
    "low_rank(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, float scale) -> (Tensor, Tensor)"
)
_PACKED = "Tensor packed, Tensor[] scales, int[] sizes, str kind, ScalarType dtype"
_OPERATORS.define(
    f"low_rank_packed(Tensor x, {_PACKED}, Tensor? bias, Tensor a, Tensor b, float scale) -> (Tensor, Tensor)"
)
_OPERATORS.define("low_rank_back(Tensor grad, Tensor weight, Tensor low_grad, Tensor a, float scale) -> Tensor")
_OPERATORS.define(f"low_rank_packed_back(Tensor grad, {_PACKED}, Tensor low_grad, Tensor a, float scale) -> Tensor")


@torch.library.impl(_OPERATORS, "low_rank", "CompositeExplicitAutograd")
def _low_rank(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """y and the thin l = x A^T; one operator, so that what keeps the results of products (parallel/recompute.py) sees
    y when it is whole, and not the product that is added to in place."""
    low = x @ a.T.to(x.dtype)
    return F.linear(x, weight, bias).addmm_(low, b.T.to(x.dtype), alpha=scale), low


@torch.library.impl(_OPERATORS, "low_rank_packed", "CompositeExplicitAutograd")
def _low_rank_packed(
    x: Tensor,
    packed: Tensor,
    scales: list[Tensor],
    sizes: list[int],
    kind: str,
    dtype: torch.dtype,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The same for a packed weight; one operator, so that the unpacked weight is nobody's to keep."""
    weight = unpack(PackedWeight(packed, scales, sizes, kind, dtype), x.dtype)
    return _low_rank(x, weight, bias, a, b, scale)


@torch.library.impl(_OPERATORS, "low_rank_back", "CompositeExplicitAutograd")
def _low_rank_back(grad: Tensor, weight: Tensor, low_grad: Tensor, a: Tensor, scale: float) -> Tensor:
    """G W + s l' A; one operator, since a compiler would copy the product before it adds to it."""
    return torch.mm(grad, weight).addmm_(low_grad, a.to(grad.dtype), alpha=scale)


@torch.library.impl(_OPERATORS, "low_rank_packed_back", "CompositeExplicitAutograd")
def _low_rank_packed_back(
    grad: Tensor,
    packed: Tensor,
    scales: list[Tensor],
    sizes: list[int],
    kind: str,
    dtype: torch.dtype,
    low_grad: Tensor,
    a: Tensor,
    scale: float,
) -> Tensor:
    """The same for a packed weight."""
    weight = unpack(PackedWeight(packed, scales, sizes, kind, dtype), grad.dtype)
    return _low_rank_back(grad, weight, low_grad, a, scale)


class _LowRank(torch.autograd.Function):
    """y = x W^T + s (x A^T) B^T for a frozen W, the thin products added in place.

    Only x and the thin l = x A^T are kept. With G = dL/dy and l' = G B:
    dL/dx = G W + s l' A;  dL/dA = s l'^T x;  dL/dB = s G^T l.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        """x [T, in], weight [out, in], bias [out] or None in one dtype; a [r, in], b [out, r] -> [T, out]."""
        y, low = torch.ops.fourfold.low_rank(x, weight, bias, a, b, scale)
        ctx.save_for_backward(x, weight, a, b, low)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """grad [T, out]; the base weight and bias are frozen."""
        x, weight, a, b, low = ctx.saved_tensors
        low_grad = grad @ b.to(grad.dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.ops.fourfold.low_rank_back(grad, weight, low_grad, a, ctx.scale)
        return grad_x, None, None, *_adapter_gradients(x, a, b, low, grad, low_grad, ctx.scale), None


class _LowRankPacked(torch.autograd.Function):
    """`_LowRank` for a packed W, which the backward pass unpacks again."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, weight: PackedWeight, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        """x [T, in], weight [out, in], bias [out] or None; a [r, in], b [out, r] -> [T, out]."""
        y, low = torch.ops.fourfold.low_rank_packed(x, *weight, bias, a, b, scale)
        ctx.save_for_backward(x, a, b, low, weight.data, *weight.scales)
        ctx.scale, ctx.sizes, ctx.kind, ctx.dtype = scale, weight.sizes, weight.kind, weight.dtype
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """grad [T, out]; the base weight and bias are frozen."""
        x, a, b, low, packed, *scales = ctx.saved_tensors
        low_grad = grad @ b.to(grad.dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:
            weight = PackedWeight(packed, scales, ctx.sizes, ctx.kind, ctx.dtype)
            grad_x = torch.ops.fourfold.low_rank_packed_back(grad, *weight, low_grad, a, ctx.scale)
        return grad_x, None, None, *_adapter_gradients(x, a, b, low, grad, low_grad, ctx.scale), None


def _adapter_gradients(
    x: Tensor, a: Tensor, b: Tensor, low: Tensor, grad: Tensor, low_grad: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """dL/dA and dL/dB."""
    grad_a = torch.mm(low_grad.T, x).mul_(scale).to(a.dtype)
    return grad_a, torch.mm(grad.T, low).mul_(scale).to(b.dtype)


def _plain_adapter(layer: LoraLayer, kwargs: dict[str, Any]) -> str | None:
    """The one active adapter if this is the plain case."""
    if kwargs or layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return None
    adapter = layer.active_adapters[0]
    plain = adapter in layer.lora_A and adapter not in layer.lora_variant and not layer.lora_bias[adapter]
    return adapter if plain else None


def _same_dtype(layer: LoraLayer, x: Tensor, adapter: str) -> bool:
    """Whether the products can be taken as they stand; where nothing casts, PEFT casts what is not of one dtype."""
    if torch.is_autocast_enabled(x.device.type):
        return True
    weight = layer.lora_A[adapter].weight
    assert isinstance(weight, Tensor)
    return x.dtype == weight.dtype


class LoraLinear(PeftLinear):
    """PEFT's LoRA linear with the short forward pass; anything but the plain case goes PEFT's own way."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., in] -> [..., out]."""
        adapter = _plain_adapter(self, kwargs)
        if adapter is None or not _same_dtype(self, x, adapter):
            return super().forward(x, *args, **kwargs)
        lora_a, lora_b = self.lora_A[adapter], self.lora_B[adapter]
        scale, dropout = self.scaling[adapter], self.lora_dropout[adapter]
        base = self.get_base_layer()
        assert isinstance(lora_a, nn.Linear) and isinstance(lora_b, nn.Linear) and isinstance(base, nn.Linear)
        a, b = lora_a.weight, lora_b.weight
        flat = x.reshape(-1, x.shape[-1])
        no_dropout = isinstance(dropout, nn.Identity) or not self.training
        compute = _compute_dtype(x)
        if no_dropout and _is_frozen(base) and base.weight.dtype == compute:
            out = _LowRank.apply(flat.to(compute), base.weight, base.bias, a, b, scale)
        else:
            low = F.linear(flat if no_dropout else dropout(flat), a)
            out = torch.addmm(F.linear(flat, base.weight, base.bias), low, b.T, alpha=scale)
        assert isinstance(out, Tensor)
        return out.view(*x.shape[:-1], out.shape[-1])


def _is_frozen(base: nn.Linear) -> bool:
    """Whether the base is a plain weight without a gradient."""
    trained = base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad)
    return is_plain(base.weight) and not trained


def _compute_dtype(x: Tensor) -> torch.dtype:
    """What autocast makes of a product with x, or x's own dtype without it."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _packed_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """x [..., in] -> [..., out]; anything but the plain case goes PEFT's own way."""
    adapter = _plain_adapter(self, kwargs)
    base, compute = self.get_base_layer(), _compute_dtype(x)
    plain = adapter is not None and _same_dtype(self, x, adapter)
    if adapter is None or not plain or state_of(base) is None or base.compute_dtype != compute:
        return self._peft.forward(self, x, *args, **kwargs)
    dropout = self.lora_dropout[adapter]
    if self.training and not isinstance(dropout, nn.Identity):
        return self._peft.forward(self, x, *args, **kwargs)
    bias = None if base.bias is None else base.bias.to(compute)
    out = _LowRankPacked.apply(
        x.reshape(-1, x.shape[-1]).to(compute),
        PackedWeight.of(base),
        bias,
        self.lora_A[adapter].weight,
        self.lora_B[adapter].weight,
        self.scaling[adapter],
    )
    assert isinstance(out, Tensor)
    return out.view(*x.shape[:-1], out.shape[-1])


@lru_cache(maxsize=4)
def _packed_class(peft: type) -> type:
    """One of PEFT's LoRA linears with the short forward pass over 4 bits."""
    return type("PackedLoraLinear", (peft,), {"forward": _packed_forward, "_peft": peft})


def _is_over_bits(layer: nn.Module) -> bool:
    """Whether a layer is PEFT's LoRA around bitsandbytes' linear layer of 4 bits, packed by now or not."""
    return isinstance(layer, LoraLayer) and type(layer.get_base_layer()).__name__ == "Linear4bit"


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
        elif _is_over_bits(module):
            module.__class__ = _packed_class(type(module))
            count += 1
    return count
