"""Clipping: by the optimizer as it reads the gradients where it can, else in place before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fourfold.parallel.reduce import GradientNorm, clip_factor, clip_gradients


@runtime_checkable
class ScalesGradients(Protocol):
    """An optimizer that multiplies gradients as it reads them, which saves a pass over them."""

    def scale_gradients_by(self, factor: Tensor | None) -> None:
        """Multiply the gradients of the next step, and of no other, by a scalar; None for leaving them alone."""
        ...


def clip_for(
    optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], max_norm: float, measure: GradientNorm
) -> Tensor:
    """Clip the gradients that the next step of an optimizer uses; every rank must call.

    Args:
        parameters: those of the optimizer.
        max_norm: the largest 2-norm of all gradients; 0 for no clipping.
        measure: gives the norm over all ranks.
    Returns:
        the norm before clipping, a scalar on the gradients' device.
    """
    if not isinstance(optimizer, ScalesGradients):
        return clip_gradients(parameters, max_norm, measure=measure)
    norm = measure(parameters)
    optimizer.scale_gradients_by(clip_factor(norm, max_norm))
    return norm
