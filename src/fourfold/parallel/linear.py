"""Cutting a linear layer, whatever it is: plain, packed into 4 bits, or with PEFT's low-rank adapters on it.

With y = x W^T + s (x A^T) B^T, rows of W go with rows of B, and columns of W with columns of A; the other matrix of the
adapter stays whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from fourfold.base.errors import PlanError
from fourfold.base.peft import LoraLayer, ParamWrapper
from fourfold.parallel.packed import cut_packed, is_packed, is_plain
from fourfold.parallel.shares import Cut

Noted = tuple[nn.Module, str, tuple[tuple[int, ...], Cut]]
"""Owner and name of a parameter that was cut, its whole shape, and the cut."""


@runtime_checkable
class KeyedByFeature(Protocol):
    """A dropout that must know at which of the whole layer's features its input starts."""

    first_feature: int


def cut_linear(layer: nn.Module, name: str, cut: Cut, *, copies: int) -> Iterator[Noted]:
    """Keep a part of a linear layer, in place.

    Args:
        name: of the layer, for messages.
        cut: of its weight [out, in].
        copies: ranks whose outputs are added up if columns are cut: each adds its share of the bias.
    Raises:
        PlanError: the layer's kind cannot be cut.
    """
    if not isinstance(layer, LoraLayer):
        assert isinstance(layer, nn.Linear)
        yield from _cut_base(layer, name, cut, copies)
        return
    base = layer.get_base_layer()
    if not isinstance(base, nn.Linear) or layer.lora_variant:
        raise PlanError(
            f"parallel.tp: the adapter of {name} is of a kind that cannot be shared (DoRA, or on stacked experts). "
            "Use plain LoRA on linear layers, or parallel.tp: 1."
        )
    yield from _cut_base(base, name, cut, copies)
    for adapters in (layer.lora_B,) if cut.dim == 0 else (layer.lora_A,):
        for adapter in adapters.values():
            assert isinstance(adapter, nn.Linear)
            yield from _cut_plain(adapter, cut)
    if cut.dim == 1:
        for dropout in layer.lora_dropout.values():
            if isinstance(dropout, KeyedByFeature):
                dropout.first_feature = cut.ranges[0][0]
    layer.in_features, layer.out_features = base.in_features, base.out_features


def cut_adapters_of_experts(region: nn.Module, experts: nn.Module, name: str, cut: Cut) -> Iterator[Noted]:
    """Keep the part of PEFT's adapters that goes with a part of stacked weights, in place.

    A is [experts * r, in] and B [out, r * experts].

    Args:
        region: a module that holds the experts and what PEFT wraps around them.
        name: of the experts' parameter, [experts, out, in], or [experts, in, out] where they say so.
        cut: of that parameter, along `in` or `out`.
    """
    of_output = cut.dim == (2 if bool(experts.is_transposed) else 1)
    for wrapper in region.modules():
        if not isinstance(wrapper, ParamWrapper) or wrapper.get_base_layer() is not experts:
            continue
        if wrapper.parameter_name == name:
            for adapter in (wrapper.lora_B if of_output else wrapper.lora_A).values():
                assert isinstance(adapter, nn.Linear)
                yield from _cut_plain(adapter, Cut(0 if of_output else 1, cut.ranges))


def _cut_base(layer: nn.Linear, name: str, cut: Cut, copies: int) -> Iterator[Noted]:
    if is_packed(layer):
        cut_packed(layer, name, cut)
        _settle_features(layer, cut)
    elif is_plain(layer.weight):
        yield from _cut_plain(layer, cut)
    else:
        raise PlanError(
            f"parallel.tp: the weight of {name} is quantised in a way that cannot be shared "
            f"({type(layer.weight).__name__}). Use quantization_bit: 4."
        )
    if layer.bias is None:
        return
    if cut.dim == 0:
        shape = tuple(layer.bias.shape)
        layer.bias = nn.Parameter(cut.take(layer.bias.data), requires_grad=layer.bias.requires_grad)
        yield layer, "bias", (shape, cut)
    else:
        layer.register_forward_hook(_ShareOfBias(copies))


def _cut_plain(layer: nn.Linear, cut: Cut) -> Iterator[Noted]:
    weight = layer.weight
    shape = tuple(weight.shape)
    layer.weight = nn.Parameter(cut.take(weight.data), requires_grad=weight.requires_grad)
    _settle_features(layer, cut)
    yield layer, "weight", (shape, cut)


def _settle_features(layer: nn.Linear, cut: Cut) -> None:
    if cut.dim == 0:
        layer.out_features = cut.size
    else:
        layer.in_features = cut.size


class _ShareOfBias:
    """Leaves a layer's output with 1/n of its bias, so that n outputs add up to one with the whole of it."""

    def __init__(self, copies: int) -> None:
        self._rest = 1.0 - 1.0 / copies

    def __call__(self, module: nn.Module, args: object, output: Tensor) -> Tensor:
        bias = module.bias
        assert isinstance(bias, Tensor)
        return output - (bias * self._rest).to(output.dtype)
