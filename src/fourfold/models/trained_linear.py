"""Linear layers whose products are operators of the engine's own, in the places of plain ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn


def compute_dtype(x: Tensor) -> torch.dtype:
    """What autocast makes of a product with x, or x's own dtype without it."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class TrainedLinear(nn.Linear):
    """A linear layer of a trained weight whose product is `product`."""

    product: ClassVar[Callable[[Tensor, Tensor], Tensor]]
    """x [T, in] in the compute dtype, weight [out, in] in any -> [T, out] as x, differentiable."""

    def forward(self, input: Tensor) -> Tensor:
        """input [..., in] -> [..., out]."""
        compute = compute_dtype(input)
        out = type(self).product(input.reshape(-1, input.shape[-1]).to(compute), self.weight)
        out = out if self.bias is None else out + self.bias.to(compute)
        return out.view(*input.shape[:-1], out.shape[-1])


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
