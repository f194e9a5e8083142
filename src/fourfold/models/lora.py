"""LoRA linear layers that cost little more than the layers they adapt.

PEFT's layers stay what they are (names, state, merging, saving); only the forward pass of the plain case - one active
adapter, no variant such as DoRA, a frozen base - is replaced by one with fewer passes over the
activations. Layers that are given the same input, as queries, keys and values are, become one product.

With base weight W [out, in], A [r, in], B [out, r] and scale s:  y = x W^T + s (x A^T) B^T

A base that bitsandbytes has packed into 4 bits is unpacked for each use, and forgotten again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourfold.base.peft import Linear as PeftLinear
from fourfold.base.peft import LoraLayer
from fourfold.models.low_rank import FrozenWeight, low_rank, with_low
from fourfold.models.siblings import Siblings, of_one_input
from fourfold.models.trained_linear import compute_dtype
from fourfold.models.wide_rank import has_room, takes, wide_rank, widened
from fourfold.parallel.packed import is_plain, state_of


@dataclass(frozen=True, slots=True)
class _Terms:
    """What the short forward pass of a layer is made of.

    Attributes:
        base: the layer that is adapted, with a frozen weight.
        a, b, scale: its adapter.
        dropout: what is done to the adapter's input; None for nothing.
    """

    base: Any
    a: Tensor
    b: Tensor
    scale: float
    dropout: nn.Module | None


def _plain_adapter(layer: LoraLayer, x: Tensor, kwargs: dict[str, Any]) -> str | None:
    """The one active adapter, if it is a plain one whose products with x can be taken as they stand."""
    if kwargs or layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return None
    adapter = layer.active_adapters[0]
    if adapter not in layer.lora_A or adapter in layer.lora_variant or layer.lora_bias[adapter]:
        return None
    weight = layer.lora_A[adapter].weight
    assert isinstance(weight, Tensor)
    # where nothing casts, PEFT casts what is not of one dtype
    return adapter if torch.is_autocast_enabled(x.device.type) or x.dtype == weight.dtype else None


def _terms(layer: LoraLayer, adapter: str | None, x: Tensor) -> _Terms | None:
    """The terms of a layer's product with x; None if they are not all that there is."""
    assert isinstance(layer, nn.Module)
    if adapter is None:
        return None
    base, dropout = layer.get_base_layer(), layer.lora_dropout[adapter]
    if not _is_frozen(base, compute_dtype(x)):
        return None
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    assert isinstance(a, Tensor) and isinstance(b, Tensor)
    changes = layer.training and not isinstance(dropout, nn.Identity)
    return _Terms(base, a, b, layer.scaling[adapter], dropout if changes else None)


def _is_frozen(base: Any, compute: torch.dtype) -> bool:
    """Whether a layer has a weight without a gradient that is multiplied in a dtype."""
    if _is_over_bits(base):
        return state_of(base) is not None and base.compute_dtype == compute
    trained = base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad)
    return is_plain(base.weight) and not trained and base.weight.dtype == compute


def _is_over_bits(base: nn.Module) -> bool:
    """Whether a layer is bitsandbytes' linear layer of 4 bits, packed by now or not."""
    return type(base).__name__ == "Linear4bit"


def _product(
    x: Tensor, weight: FrozenWeight, terms: Sequence[_Terms], wide: Tensor | None = None
) -> tuple[Tensor, ...]:
    """x [..., in] times one weight, or several one below the other -> [..., its out] of each.

    Args:
        wide: the same weight with room for the terms beside it, if it has such.
    """
    compute = compute_dtype(x)
    flat = x.reshape(-1, x.shape[-1]).to(compute)
    biases = [each.base.bias.to(compute) for each in terms if each.base.bias is not None]
    bias = None if not biases else biases[0] if len(biases) == 1 else torch.cat(biases)
    a, b, scale = [each.a for each in terms], [each.b for each in terms], terms[0].scale
    is_trained = torch.compiler.is_compiling() and torch.is_grad_enabled()
    if any(each.dropout is not None for each in terms):
        low = [_low(flat, each) for each in terms]
        out = with_low(flat, weight, bias, low, b)
    elif wide is not None and is_trained and has_room(wide, a, b):  # or there are other adapters than it was made for
        out = wide_rank(flat, wide, bias, a, b, scale)
    else:
        out = low_rank(flat, weight, bias, a, b, scale)
    return tuple(part.view(*x.shape[:-1], part.shape[-1]) for part in out)


def _low(flat: Tensor, terms: _Terms) -> Tensor:
    """What an adapter's inner matrix makes of x [T, in], dropout and all."""
    kept = flat if terms.dropout is None else terms.dropout(flat)
    return kept @ (terms.scale * terms.a.to(flat.dtype)).T


class LoraSiblings(Siblings[LoraLayer]):
    """LoRA layers of one input.

    Args:
        layers: see `Siblings`.
        weight: theirs, one below the other, of which each has its rows; None where they are packed.
    """

    def __init__(self, layers: dict[str, LoraLayer], weight: Tensor | None) -> None:
        super().__init__(layers)
        self._weight = weight
        self._wide: Tensor | None = None

    def widen(self) -> bool:
        """Make room beside their weight for their terms; returns whether there is.

        The weight is put elsewhere, and the layers' own with it.
        """
        if self._weight is None or self._wide is not None or not takes(self._weight):
            return False
        (rows, columns), rank = self._weight.shape, sum(map(_rank, self.layers.values()))
        self._wide = widened(self._weight, rank)
        self._weight = self._wide[:rows, :columns]
        _give_rows(self.layers, self._weight)
        return True

    def compute(self, x: Tensor) -> tuple[Tensor, ...] | None:
        """See `Siblings`."""
        terms: list[_Terms] = []
        for layer in self.layers.values():
            found = _terms(layer, _plain_adapter(layer, x, {}), x)
            if found is None or (terms and found.scale != terms[0].scale):
                return None
            terms.append(found)
        if self._weight is None:
            weight = FrozenWeight.packed([each.base for each in terms])
        else:
            weight = FrozenWeight.plain(self._weight)
        return _product(x, weight, terms, self._wide)


def _rank(layer: LoraLayer) -> int:
    """Of a layer's active adapters."""
    return sum(layer.r[name] for name in layer.active_adapters)


def _short_forward(layer: LoraLayer, adapter: str | None, x: Tensor) -> Tensor | None:
    """x [..., in] -> [..., out]; None if it is anything but the plain case over a frozen base."""
    siblings: tuple[str, LoraSiblings] | None = getattr(layer, "siblings", None)
    if siblings is not None and adapter is not None:
        name, group = siblings
        if (found := group.take(name, x)) is not None:
            return found
    terms = _terms(layer, adapter, x)
    if terms is None:
        return None
    packed = _is_over_bits(terms.base)
    weight = FrozenWeight.packed([terms.base]) if packed else FrozenWeight.plain(terms.base.weight)
    return _product(x, weight, [terms], getattr(layer, "room", None))[0]


class LoraLinear(PeftLinear):
    """PEFT's LoRA linear with the short forward pass; anything but the plain case goes PEFT's own way."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., in] -> [..., out]."""
        adapter = _plain_adapter(self, x, kwargs)
        if adapter is None:
            return super().forward(x, *args, **kwargs)
        found = _short_forward(self, adapter, x)
        return self._in_two(x, adapter) if found is None else found

    def _in_two(self, x: Tensor, adapter: str) -> Tensor:
        """The same over a base that is trained or of another dtype."""
        lora_a, lora_b, base = self.lora_A[adapter], self.lora_B[adapter], self.get_base_layer()
        assert isinstance(lora_a, nn.Linear) and isinstance(lora_b, nn.Linear) and isinstance(base, nn.Linear)
        flat = x.reshape(-1, x.shape[-1])
        low = F.linear(self.lora_dropout[adapter](flat), lora_a.weight)
        out = torch.addmm(F.linear(flat, base.weight, base.bias), low, lora_b.weight.T, alpha=self.scaling[adapter])
        return out.view(*x.shape[:-1], out.shape[-1])


def _packed_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """x [..., in] -> [..., out]; anything but the plain case goes PEFT's own way."""
    found = _short_forward(self, _plain_adapter(self, x, kwargs), x)
    return self._peft.forward(self, x, *args, **kwargs) if found is None else found


@lru_cache(maxsize=4)
def _packed_class(peft: type) -> type:
    """One of PEFT's LoRA linears with the short forward pass over 4 bits."""
    return type("PackedLoraLinear", (peft,), {"forward": _packed_forward, "_peft": peft})


def use_short_forward(model: nn.Module) -> int:
    """Give every plain PEFT LoRA linear of a model the short forward pass.

    Returns:
        how many layers have it now.
    """
    count = 0
    for module in model.modules():
        if not isinstance(module, LoraLayer):
            continue
        base = module.get_base_layer()
        # The class is exchanged, not the object: parameters, hooks and names stay as PEFT made them.
        if type(module) is PeftLinear and type(base) is nn.Linear:
            module.__class__ = LoraLinear
            count += 1
        elif _is_over_bits(base):
            module.__class__ = _packed_class(type(module))
            count += 1
    return count


def join_siblings(model: nn.Module, *, apart: frozenset[str] = frozenset()) -> int:
    """Let layers with the short forward pass that are given the same input be one product each.

    Plain weights are put one below the other in memory, a group at a time, and stay what they were to everybody else;
    none of them may be replaced or resized afterwards.

    Args:
        model: on its device, with the weights that this rank has for good.
        apart: names of layers that stay by themselves.
    Returns:
        how many groups there are.
    """
    count = 0
    for found in of_one_input(model):
        if apart.isdisjoint(found) and all(map(_is_short, found.values())):
            layers: dict[str, Any] = dict(found)
            if _are_alike(layers):
                group = LoraSiblings(layers, _one_below_the_other(layers))
                for name, layer in layers.items():
                    layer.siblings = (name, group)
                count += 1
    return count


def _is_short(layer: nn.Module) -> bool:
    """Whether a layer has the short forward pass."""
    return isinstance(layer, LoraLinear) or getattr(type(layer), "forward", None) is _packed_forward


def _are_alike(layers: Mapping[str, LoraLayer]) -> bool:
    """Whether bases are of one kind, dtype and width, and all or none have a bias."""
    bases: list[Any] = [layer.get_base_layer() for layer in layers.values()]
    kinds = {(type(base), base.in_features, base.weight.dtype, base.weight.device, base.bias is None) for base in bases}
    if len(kinds) > 1 or bases[0].weight.is_meta:
        return False
    return _is_over_bits(bases[0]) or all(_is_frozen(base, base.weight.dtype) for base in bases)


def _one_below_the_other(layers: Mapping[str, LoraLayer]) -> Tensor | None:
    bases: list[Any] = [layer.get_base_layer() for layer in layers.values()]
    if _is_over_bits(bases[0]):
        return None
    joined = torch.cat([base.weight.data for base in bases])
    _give_rows(layers, joined)
    return joined


def _give_rows(layers: Mapping[str, LoraLayer], joined: Tensor) -> None:
    """Let each layer's base have its rows of one weight."""
    bases: list[Any] = [layer.get_base_layer() for layer in layers.values()]
    for base, rows in zip(bases, joined.split([base.out_features for base in bases]), strict=True):
        base.weight.data = rows


def make_room(model: nn.Module) -> int:
    """Make room for low-rank terms beside the plain weights of layers with the short forward pass, which run compiled.

    Args:
        model: after `join_siblings`; its adapters have their ranks by now.
    Returns:
        how many weights have room now, joined ones as one.
    """
    groups: dict[int, LoraSiblings] = {}
    count = 0
    for module in model.modules():
        if not _is_short(module) or _drops(module):
            continue
        _, group = getattr(module, "siblings", None) or ("", None)
        if isinstance(group, LoraSiblings):
            groups[id(group)] = group
        elif isinstance(module, LoraLinear):
            count += _make_room(module)
    return count + sum(group.widen() for group in groups.values())


def _drops(layer: Any) -> bool:
    """Whether anything is done to the adapters' inputs, which then are not the large product's."""
    return not all(isinstance(dropout, nn.Identity) for dropout in layer.lora_dropout.values())


def _make_room(layer: Any) -> bool:
    """The same for a layer that is alone, unless it has room; returns whether it had none."""
    base = layer.get_base_layer()
    if getattr(layer, "room", None) is not None or base.weight.is_meta or not _is_frozen(base, base.weight.dtype):
        return False
    if not takes(base.weight):
        return False
    rows, columns = base.weight.shape
    layer.room = widened(base.weight.data, _rank(layer))
    base.weight.data = layer.room[:rows, :columns]
    return True
