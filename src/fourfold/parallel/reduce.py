"""Reductions over ranks: denominators, reported sums, counts, and the gradient norm."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fourfold.parallel.sharded import full


@dataclass(frozen=True, slots=True)
class Reducer:
    """Adds up what ranks found; with no group, what one rank found is all there is.

    Attributes:
        group: the ranks whose losses add up (data- and context-parallel ones), None for one.
        world: all ranks of the job, None for one.
    """

    group: dist.ProcessGroup | None = None
    world: dist.ProcessGroup | None = None

    def sums(self, values: Mapping[str, float]) -> dict[str, float]:
        """Each value summed over the group; every rank must give the same names."""
        if self.group is None:
            return dict(values)
        names = sorted(values)
        # On the host, by gloo. In fp64 counts stay exact, and sums hardly depend on the number of ranks.
        total = torch.tensor([values[name] for name in names], dtype=torch.float64)
        dist.all_reduce(total, group=self.group)
        return dict(zip(names, total.tolist(), strict=True))

    def largest(self, value: int) -> int:
        """The largest value over all ranks of the job."""
        if self.world is None:
            return value
        found = torch.tensor([value])
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.world)
        return int(found)


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients in place so that their global 2-norm is at most `max_norm`; 0 leaves them alone.

    Returns:
        the norm before clipping, over all ranks, scalar fp32.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return torch.zeros(())
    norm = full(nn.utils.get_total_norm(grads))
    if max_norm > 0:
        # The same factor as torch's clip_grad_norm_, so that curves are comparable to the last digit.
        factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        scale = factor.item() if isinstance(grads[0], DTensor) else factor
        for grad in grads:
            grad.mul_(scale)
    return norm
