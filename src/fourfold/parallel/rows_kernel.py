"""Triton kernels of experts' rows: a token spread to its rows, its rows added up, its gradient handed to them, and the
orders of rows that came from other ranks.

A program has a token and all of its rows, so that what they share is read once. PyTorch's own sum over a token's rows
takes four times what memory needs, its gradient four passes; a compiler's kernels go row by row (docs/lab-notes.md).

Imported only where it runs: on CUDA, where PyTorch brings Triton along.

Shape legend: T tokens, K choices of each, N = T K rows, H hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

_BLOCK = 2048
"""Numbers of a row that a program has at a time."""
_BLOCK_OF_ALL = 1024
"""The same, where it has all of a token's rows at once."""
_REGROUP_BLOCK = 64
"""Rows that a program finds the place of; each is compared with every segment."""


@triton.jit
def _sum(  # no annotations but constexpr: the compiler reads them
    rows, inverse, weights, out, width, choices: tl.constexpr, weighted: tl.constexpr, block: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * block + tl.arange(0, block)
    there = place < width
    total = tl.zeros([block], tl.float32)
    for choice in tl.static_range(choices):
        row = tl.load(inverse + token * choices + choice)
        x = tl.load(rows + row * width + place, mask=there).to(tl.float32)
        if weighted:
            x *= tl.load(weights + token * choices + choice).to(tl.float32)
        total += x
    tl.store(out + token * width + place, total.to(out.dtype.element_ty), mask=there)


@triton.jit
def _spread(  # no annotations but constexpr: the compiler reads them
    tokens, inverse, out, width, choices: tl.constexpr, block: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * block + tl.arange(0, block)
    there = place < width
    x = tl.load(tokens + token * width + place, mask=there)
    for choice in tl.static_range(choices):
        row = tl.load(inverse + token * choices + choice)
        tl.store(out + row * width + place, x, mask=there)


@triton.jit
def _spread_gradient(  # no annotations but constexpr: the compiler reads them
    grad,
    rows,
    weights,
    inverse,
    out,
    of_weights,
    width,
    choices: tl.constexpr,
    many: tl.constexpr,
    asked: tl.constexpr,
    block: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    choice = tl.arange(0, many)
    chosen = choice < choices
    row = tl.load(inverse + token * choices + choice, mask=chosen, other=0)
    weight = tl.load(weights + token * choices + choice, mask=chosen, other=0.0).to(tl.float32)
    total = tl.zeros([many], tl.float32)
    for start in range(0, width, block):
        place = start + tl.arange(0, block)
        g = tl.load(grad + token * width + place, mask=place < width, other=0.0).to(tl.float32)[None, :]
        there = chosen[:, None] & (place < width)[None, :]
        at = row[:, None] * width + place[None, :]
        tl.store(out + at, (g * weight[:, None]).to(out.dtype.element_ty), mask=there)
        if asked:
            total += tl.sum(g * tl.load(rows + at, mask=there, other=0.0).to(tl.float32), 1)
    if asked:
        tl.store(of_weights + token * choices + choice, total.to(of_weights.dtype.element_ty), mask=chosen)


@triton.jit
def _ends(  # no annotations but constexpr: the compiler reads them
    arrived, by_sender, by_expert, experts_end, ranks: tl.constexpr, experts: tl.constexpr, block: tl.constexpr
):
    place = tl.arange(0, block)
    there = place < ranks * experts
    tl.store(by_sender + place, tl.cumsum(tl.load(arrived + place, mask=there, other=0), 0), mask=there)
    expert, rank = place // ranks, place % ranks
    total = tl.cumsum(tl.load(arrived + rank * experts + expert, mask=there, other=0), 0)
    tl.store(by_expert + place, total, mask=there)
    tl.store(experts_end + expert, total, mask=there & (rank == ranks - 1))


@triton.jit
def _place(ends, others, place, columns: tl.constexpr, segments: tl.constexpr, many: tl.constexpr):
    """Where the rows at `place` lie in the other order: their segment there begins elsewhere, and is as long."""
    number = tl.arange(0, many)
    known = tl.load(ends + number, mask=number < segments, other=2147483647)
    segment = tl.sum((known[None, :] <= place[:, None]).to(tl.int32), 1)
    rows: tl.constexpr = segments // columns
    other = segment % columns * rows + segment // columns
    start = tl.load(ends + segment - 1, mask=(segment > 0) & (segment < segments), other=0)
    begins = tl.load(others + other - 1, mask=(other > 0) & (segment < segments), other=0)
    return (place - start + begins).to(tl.int64)


@triton.jit
def _regroup(  # no annotations but constexpr: the compiler reads them
    by_sender,
    by_expert,
    senders_row,
    experts_row,
    num,
    ranks: tl.constexpr,
    experts: tl.constexpr,
    many: tl.constexpr,
    block: tl.constexpr,
):
    place = tl.program_id(0) * block + tl.arange(0, block)
    segments: tl.constexpr = ranks * experts
    tl.store(senders_row + place, _place(by_expert, by_sender, place, ranks, segments, many), mask=place < num)
    tl.store(experts_row + place, _place(by_sender, by_expert, place, experts, segments, many), mask=place < num)


def sum_rows(rows: Tensor, inverse: Tensor, weights: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Sum over a token's choices of its rows, weighted if asked, in fp32: -> [T, H] of `dtype`.

    Args:
        rows: [N, H], contiguous.
        inverse: the row of each choice, [T, K] int64, contiguous.
        weights: [T, K], contiguous.
    """
    assert rows.is_contiguous() and inverse.is_contiguous() and (weights is None or weights.is_contiguous())
    tokens, choices = inverse.shape
    width = rows.shape[1]
    out = torch.empty(tokens, width, dtype=dtype, device=rows.device)
    grid = (tokens, triton.cdiv(width, _BLOCK))
    launch: Any = _sum
    if out.numel():
        given = rows if weights is None else weights
        launch[grid](rows, inverse, given, out, width, choices, weights is not None, _BLOCK, num_warps=4)
    return out


def spread(tokens: Tensor, inverse: Tensor) -> Tensor:
    """Each token at all of its rows: -> [N, H].

    Args:
        tokens: [T, H], contiguous.
        inverse: the row of each choice, [T, K] int64, contiguous.
    """
    assert tokens.is_contiguous() and inverse.is_contiguous()
    width = tokens.shape[1]
    out = tokens.new_empty(inverse.numel(), width)
    launch: Any = _spread
    if out.numel():
        grid = (len(tokens), triton.cdiv(width, _BLOCK))
        launch[grid](tokens, inverse, out, width, inverse.shape[1], _BLOCK, num_warps=2)
    return out


def spread_gradient(
    grad: Tensor, rows: Tensor | None, weights: Tensor, inverse: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The gradients of what `sum_rows` was given: of rows, weights * grad, [N, H] of `dtype`; of weights, <rows, grad>.

    Args:
        grad: of the sums, [T, H], contiguous.
        rows: as there; None where that of weights is not asked for, and is empty.
        weights: as there.
        inverse: as there.
    """
    assert grad.is_contiguous() and weights.is_contiguous() and (rows is None or rows.is_contiguous())
    assert inverse.is_contiguous()
    (tokens, choices), width = weights.shape, grad.shape[1]
    out = torch.empty(inverse.numel(), width, dtype=dtype, device=grad.device)
    of_weights = torch.empty_like(weights) if rows is not None else weights.new_empty(0)
    many, block = triton.next_power_of_2(choices), min(triton.next_power_of_2(width), _BLOCK_OF_ALL)
    launch: Any = _spread_gradient
    if out.numel():
        given, asked = (out, False) if rows is None else (rows, True)
        launch[(tokens,)](
            grad, given, weights, inverse, out, of_weights, width, choices, many, asked, block, num_warps=4
        )
    return out, of_weights


def regroup(arrived: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `dispatch.regroup`; `arrived` [ranks, E] int32, contiguous."""
    ranks, experts = arrived.shape
    by_sender, by_expert = (torch.empty_like(arrived) for _ in range(2))
    ends = arrived.new_empty(experts)
    many = triton.next_power_of_2(ranks * experts)
    launch: Any = _ends
    launch[(1,)](arrived, by_sender, by_expert, ends, ranks, experts, many)
    senders_row, experts_row = (torch.empty(rows, dtype=torch.long, device=arrived.device) for _ in range(2))
    launch = _regroup
    launch[(triton.cdiv(rows, _REGROUP_BLOCK),)](
        by_sender, by_expert, senders_row, experts_row, rows, ranks, experts, many, _REGROUP_BLOCK
    )
    return senders_row, experts_row, ends
