"""Collectives that autograd knows: what a forward pass sends, and what its backward pass sends back.

Each pair is named by what happens to the values. A value is either the same on all ranks of the group, a part of the
whole along one dimension, or a partial sum of the whole. Its gradient is of the kind that the comment says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

try:
    from torch.distributed import all_gather_single, reduce_scatter_single
except ImportError:  # their names before torch 2.13, which warns of them
    from torch.distributed import all_gather_into_tensor as all_gather_single
    from torch.distributed import reduce_scatter_tensor as reduce_scatter_single


_Operation = Callable[[Tensor], Tensor]


def _all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, group=group)
    return out


def _all_gather(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    out = _empty(x, dim, x.shape[dim] * group.size())
    with _leading(out, dim) as leading:
        all_gather_single(leading, x.movedim(dim, 0).contiguous(), group=group)
    return out


def _reduce_scatter(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    out = _empty(x, dim, x.shape[dim] // group.size())
    with _leading(out, dim) as leading:
        reduce_scatter_single(leading, x.movedim(dim, 0).contiguous(), group=group)
    return out


def _empty(like: Tensor, dim: int, size: int) -> Tensor:
    return like.new_empty([*like.shape[:dim], size, *like.shape[dim + 1 :]])


@contextmanager
def _leading(out: Tensor, dim: int) -> Iterator[Tensor]:
    """A contiguous tensor with `dim` first, whose content is in `out` afterwards; no copy where one is not needed.

    `out` stays no view itself: what watches a module's outputs (FSDP) cannot follow in-place changes of views.
    """
    moved = out.movedim(dim, 0)
    leading = moved if moved.is_contiguous() else torch.empty_like(moved, memory_format=torch.contiguous_format)
    yield leading
    if leading is not moved:
        moved.copy_(leading)


def _own(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    return x.chunk(group.size(), dim)[group.rank()].contiguous()


def _swap(pieces: Tensor, group: dist.ProcessGroup) -> Tensor:
    received = torch.empty_like(pieces, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received, pieces.contiguous(), group=group)
    return received


def _as_it_is(x: Tensor) -> Tensor:
    return x


class _Exchange(torch.autograd.Function):
    """One operation on the values, another on their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: _Operation, back: _Operation) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.back = back
        return x.view_as(x) if there is _as_it_is else there(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.back(grad), None, None


def _exchange(x: Tensor, there: _Operation, back: _Operation) -> Tensor:
    return _Exchange.apply(x, there, back)  # type: ignore[return-value]


def copy(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The same value goes into work that is divided: its gradient arrives in partial sums, and is added up."""
    return _exchange(x, _as_it_is, partial(_all_reduce, group=group))


def reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Partial sums are added up; the gradient is the same on all ranks."""
    return _exchange(x, partial(_all_reduce, group=group), _as_it_is)


def add_up(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Partial sums are added up, and so are the gradients: each rank goes on with a part of one loss."""
    return _exchange(x, partial(_all_reduce, group=group), partial(_all_reduce, group=group))


def gather(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """Parts are joined for work that is divided: the gradient arrives in partial sums, each rank gets its part's."""
    return _exchange(x, partial(_all_gather, dim=dim, group=group), partial(_reduce_scatter, dim=dim, group=group))


def reduce_scatter(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """Partial sums are added up, each rank gets a part; the gradients of the parts are joined."""
    return _exchange(x, partial(_reduce_scatter, dim=dim, group=group), partial(_all_gather, dim=dim, group=group))


def split(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """Each rank takes its part of what is the same on all; the gradients of the parts are joined."""
    return _exchange(x, partial(_own, dim=dim, group=group), partial(_all_gather, dim=dim, group=group))


def join(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """Parts are joined for work that all ranks do alike: the gradient is the same on all, each takes its part's."""
    return _exchange(x, partial(_all_gather, dim=dim, group=group), partial(_own, dim=dim, group=group))


def swap(pieces: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The i-th piece goes to the i-th rank and that one's comes in its place; so do the gradients.

    Args:
        pieces: [ranks, ...], the same shape on every rank of the group.
    """
    return _exchange(pieces, partial(_swap, group=group), partial(_swap, group=group))


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """The value as it is, its gradient times `factor`."""
    return _exchange(x, _as_it_is, lambda grad: grad * factor)
