"""Triton kernels of experts' rows: a token's rows added up, and a token's gradient handed to its rows.

PyTorch's own sum over a token's rows takes four times what memory needs; the gradient takes four passes, and two thirds
of the time of a compiler's kernel for it (docs/lab-notes.md).

Imported only where it runs: on CUDA, where PyTorch brings Triton along.

Shape legend: T tokens, K choices of each, N = T K rows, H hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

_SUM_BLOCK = 1024
_MOST_BLOCK = 2048
"""Numbers of a row that a program has at a time."""


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
    grad, rows, weights, order, out, of_weights, width, choices: tl.constexpr, asked: tl.constexpr, block: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    pair = tl.load(order + row)
    weight = tl.load(weights + pair).to(tl.float32)
    grad += pair // choices * width
    total = tl.zeros([block], tl.float32)
    for start in range(0, width, block):
        place = start + tl.arange(0, block)
        there = place < width
        g = tl.load(grad + place, mask=there, other=0.0).to(tl.float32)
        tl.store(out + row * width + place, (g * weight).to(out.dtype.element_ty), mask=there)
        if asked:
            total += g * tl.load(rows + row * width + place, mask=there, other=0.0).to(tl.float32)
    if asked:
        tl.store(of_weights + pair, tl.sum(total, 0).to(of_weights.dtype.element_ty))


def sum_rows(rows: Tensor, inverse: Tensor, weights: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Sum over a token's choices of its rows, weighted if asked, in fp32: -> [T, H] of `dtype`.

    Args:
        rows: [N, H], contiguous.
        inverse: the row of each choice, [T, K] int64, contiguous.
        weights: [T, K], contiguous.
    """
    tokens, choices = inverse.shape
    width = rows.shape[1]
    out = torch.empty(tokens, width, dtype=dtype, device=rows.device)
    grid = (tokens, triton.cdiv(width, _SUM_BLOCK))
    launch: Any = _sum
    if out.numel():
        given = rows if weights is None else weights
        launch[grid](rows, inverse, given, out, width, choices, weights is not None, _SUM_BLOCK, num_warps=4)
    return out


def spread_gradient(
    grad: Tensor, rows: Tensor | None, weights: Tensor, order: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The gradients of what `sum_rows` was given: of rows, weights * grad, [N, H] of `dtype`; of weights, <rows, grad>.

    Args:
        grad: of the sums, [T, H], contiguous.
        rows: as there; None where that of weights is not asked for, and is empty.
        weights: as there.
        order: the choice of each row, [N] int64: choice j of token t is t K + j.
    """
    choices, width = weights.shape[1], grad.shape[1]
    out = torch.empty(len(order), width, dtype=dtype, device=grad.device)
    of_weights = torch.empty_like(weights) if rows is not None else weights.new_empty(0)
    block = min(triton.next_power_of_2(width), _MOST_BLOCK)
    launch: Any = _spread
    if out.numel():
        given = out if rows is None else rows
        launch[(len(order),)](
            grad, given, weights, order, out, of_weights, width, choices, rows is not None, block, num_warps=8
        )
    return out, of_weights
