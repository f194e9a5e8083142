"""Reductions over a step: denominators, gradient norm and reported sums.

One process today; the reductions over a mesh belong here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


def total_denominators(local: Mapping[str, float]) -> dict[str, float]:
    """This rank's denominators summed over all data-parallel ranks."""
    return dict(local)


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients in place so that their global 2-norm is at most `max_norm`; 0 leaves them alone.

    Returns:
        the norm before clipping, scalar fp32 on the parameters' device.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return torch.zeros(())
    norm = nn.utils.get_total_norm(grads)
    if max_norm > 0:
        # The same factor as torch's clip_grad_norm_, so that curves are comparable to the last digit.
        factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        for grad in grads:
            grad.mul_(factor)
    return norm
