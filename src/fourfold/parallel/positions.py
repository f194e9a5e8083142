"""Collectives along a sequence that autograd knows: each one's backward pass is the opposite collective.

Written out because torch's own (`_functional_collectives.*_autograd`) changed between 2.11 and 2.13.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed both and warns of the old names; 2.11 knows these only.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, group: dist.ProcessGroup) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.group = group
        whole = local.new_empty((local.shape[0] * group.size(), *local.shape[1:]))
        _all_gather_single(whole, local.contiguous(), group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        summed = grad.new_empty((grad.shape[0] // ctx.group.size(), *grad.shape[1:]))
        _reduce_scatter_single(summed, grad.contiguous(), group=ctx.group)
        return summed, None


def all_gather(local: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Every rank's tensor, one after the other; backward, each rank gets the sum of the gradients of its own.

    Args:
        local: [N, ...], the same shape on every rank of the group.
    Returns:
        [ranks * N, ...], in the order of ranks.
    """
    return _AllGather.apply(local, group)  # type: ignore[no-any-return]


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pieces: Tensor, group: dist.ProcessGroup) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.group = group
        received = torch.empty_like(pieces, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, pieces.contiguous(), group=group)
        return received

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        returned = torch.empty_like(grad, memory_format=torch.contiguous_format)
        dist.all_to_all_single(returned, grad.contiguous(), group=ctx.group)
        return returned, None


def all_to_all(pieces: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The i-th piece goes to the i-th rank, and the piece from the i-th rank comes back in its place.

    Args:
        pieces: [ranks, ...], the same shape on every rank of the group.
    """
    return _AllToAll.apply(pieces, group)  # type: ignore[no-any-return]
