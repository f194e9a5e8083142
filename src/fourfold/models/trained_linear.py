"""Linear layers of trained weights whose products are operators of the engine's own, in the places of plain ones.

Those that are given the same input may be one product: its operands are then prepared once, and the gradient of the
input is one product instead of a sum of several.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from fourfold.models.siblings import Siblings, of_one_input


def compute_dtype(x: Tensor) -> torch.dtype:
    """What autocast makes of a product with x, or x's own dtype without it."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class TrainedLinear(nn.Linear):
    """A linear layer of a trained weight whose product is `product`.

    Attributes:
        siblings: its name among the layers of its input, and those; None where it is alone.
    """

    product: ClassVar[Callable[..., tuple[Tensor, ...]]]
    """x [..., in] in the compute dtype, weights [out, in] each in any -> [..., out] each as x, differentiable."""
    siblings: tuple[str, TrainedSiblings] | None = None

    def forward(self, input: Tensor) -> Tensor:
        """input [..., in] -> [..., out]."""
        if self.siblings is None:
            out = products_of([self], input)[0]
        else:
            name, group = self.siblings
            found = group.take(name, input)
            assert found is not None
            out = found
        return out if self.bias is None else out + self.bias.to(out.dtype)


class TrainedSiblings(Siblings[TrainedLinear]):
    """Layers of one input, all of one kind."""

    def compute(self, x: Tensor) -> tuple[Tensor, ...]:
        """See `Siblings`; without biases."""
        return products_of(list(self.layers.values()), x)


def products_of(layers: Sequence[TrainedLinear], x: Tensor) -> tuple[Tensor, ...]:
    """x [..., in] -> [..., out] of each of some layers of one kind, without biases."""
    return type(layers[0]).product(x.to(compute_dtype(x)), *(layer.weight for layer in layers))


def exchange(blocks: Iterable[nn.Module], kind: type[TrainedLinear], takes: Callable[[nn.Linear], bool]) -> int:
    """Make trained plain linear layers of some blocks another kind, in place.

    Args:
        takes: which of them.
    Returns:
        how many were.
    """
    found = [
        layer
        for block in blocks
        for layer in block.modules()
        if type(layer) is nn.Linear and layer.weight.requires_grad and takes(layer)
    ]
    for layer in found:
        layer.__class__ = kind
    return len(found)


def join_trained_siblings(model: nn.Module, *, apart: frozenset[str] = frozenset()) -> int:
    """Let trained layers of one kind that are given the same input be one product each.

    Args:
        apart: names of layers that stay by themselves.
    Returns:
        how many groups there are.
    """
    count = 0
    for found in of_one_input(model):
        layers = {name: layer for name, layer in found.items() if isinstance(layer, TrainedLinear)}
        kinds = {(type(layer), layer.in_features, layer.weight.dtype) for layer in layers.values()}
        if len(layers) == len(found) and len(kinds) == 1 and apart.isdisjoint(found):
            group = TrainedSiblings(layers)
            for name, layer in layers.items():
                layer.siblings = (name, group)
            count += 1
    return count
