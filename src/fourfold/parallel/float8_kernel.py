"""Triton kernels that cast a matrix to float8: one finds its largest magnitude, one casts it as it lies and transposed.

Products in float8 take a first operand row by row and a second one column by column, so the operands of a backward
pass are laid out anew. What the compiler makes of that writes single bytes far apart: on an H100 such kernels took as
long as float8 saved. Of a largest magnitude it makes a kernel that computes the matrix a second time, which takes
longer than to read it. A matrix may come in parts, as the weights of layers of one input do and their gradients.

Imported only where it runs: on CUDA, where PyTorch brings Triton along.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

MOST_PARTS = 3
"""What the kernel has arguments for."""
_BLOCK = 128
"""Rows and columns of one program that casts: a line of bytes of each layout fills a transfer of the GPU's memory."""
_SEARCHES = 1024
"""Programs that look for the largest magnitude, each in tiles of its own; some eight a multiprocessor of an H100."""
_TILE = (4, 1024)
"""Rows and columns of such a tile: two vectors of 16 bytes of 16 bits for each thread and row."""


@triton.jit
def _search(values, num_rows, num_columns, stride, most, height: tl.constexpr, width: tl.constexpr):
    across = tl.cdiv(num_columns, width)
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, height) * across, tl.num_programs(0)):
        row = (tile // across).to(tl.int64) * height + tl.arange(0, height)
        column = (tile % across) * width + tl.arange(0, width)
        is_there = (row < num_rows)[:, None] & (column < num_columns)[None, :]
        found = tl.load(values + row[:, None] * stride + column[None, :], mask=is_there, other=0.0)
        most = tl.maximum(most, tl.abs(found.to(tl.float32)))
    return most


@triton.jit
def _largest(  # no annotations but constexpr: the compiler reads them
    values,
    values_1,
    values_2,
    largest,
    num_rows,
    num_rows_1,
    num_rows_2,
    num_columns,
    num_columns_1,
    num_columns_2,
    stride,
    stride_1,
    stride_2,
    parts: tl.constexpr,
    height: tl.constexpr,
    width: tl.constexpr,
):
    most = tl.zeros((height, width), tl.float32)
    most = _search(values, num_rows, num_columns, stride, most, height, width)
    if parts > 1:
        most = _search(values_1, num_rows_1, num_columns_1, stride_1, most, height, width)
    if parts > 2:
        most = _search(values_2, num_rows_2, num_columns_2, stride_2, most, height, width)
    tl.store(largest + tl.program_id(0), tl.max(most))


@triton.jit
def _cast(  # no annotations but constexpr: the compiler reads them
    values,
    values_1,
    values_2,
    largest,
    rows,
    columns,
    scale,
    num_rows,
    num_columns,
    stride,
    stride_1,
    stride_2,
    end,
    end_1,
    end_2,
    limit: tl.constexpr,
    has_rows: tl.constexpr,
    has_columns: tl.constexpr,
    beside: tl.constexpr,
    parts: tl.constexpr,
    block: tl.constexpr,
    searches: tl.constexpr,
):
    # each part has its programs, so that no program has numbers of two
    number = tl.program_id(1) if beside else tl.program_id(0)
    start = 0
    if parts > 1:
        first = tl.cdiv(end, block)
        is_other = number >= first
        number = tl.where(is_other, number - first, number)
        start = tl.where(is_other, end, 0)
        if parts > 2:
            first = tl.cdiv(end_1 - end, block)
            is_last = is_other & (number >= first)
            number = tl.where(is_last, number - first, number)
            start = tl.where(is_last, end_1, start)
            values_1 = tl.where(is_last, values_2, values_1)
            stride_1 = tl.where(is_last, stride_2, stride_1)
            end_1 = tl.where(is_last, end_2, end_1)
        values = tl.where(is_other, values_1, values)
        stride = tl.where(is_other, stride_1, stride)
        end = tl.where(is_other, end_1, end)
    along = number.to(tl.int64) * block + tl.arange(0, block)
    if beside:
        row = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
        column, is_row, is_column = along, row < num_rows, along < end - start
        to_row, to_column = row, start + column
    else:
        column = tl.program_id(1).to(tl.int64) * block + tl.arange(0, block)
        row, is_row, is_column = along, along < end - start, column < num_columns
        to_row, to_column = start + row, column
    amax = tl.maximum(tl.max(tl.load(largest + tl.arange(0, searches))), 1e-12)
    factor = limit / amax
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(scale, amax / limit)
    if has_rows:
        is_there = is_row[:, None] & is_column[None, :]
        found = tl.load(values + row[:, None] * stride + column[None, :], mask=is_there, other=0.0).to(tl.float32)
        narrow = tl.clamp(found * factor, -limit, limit).to(rows.dtype.element_ty)
        tl.store(rows + to_row[:, None] * num_columns + to_column[None, :], narrow, mask=is_there)
    if has_columns:
        is_there = is_column[:, None] & is_row[None, :]
        # read again, from the cache, since turning a tile of fp32 by tl.trans gave wrong numbers (docs/lab-notes.md)
        found = tl.load(values + row[None, :] * stride + column[:, None], mask=is_there, other=0.0).to(tl.float32)
        narrow = tl.clamp(found * factor, -limit, limit).to(columns.dtype.element_ty)
        tl.store(columns + to_column[:, None] * num_rows + to_row[None, :], narrow, mask=is_there)


@torch.library.triton_op("fourfold::largest_magnitudes", mutates_args=())
def largest_magnitudes(parts: Sequence[Tensor]) -> Tensor:
    """The largest magnitudes of shares of a matrix, fp32 [n]: the largest of those is the matrix's.

    Args:
        parts: of it, at most `MOST_PARTS`, [..., N] each, of one dtype.
    """
    assert len(parts) <= MOST_PARTS
    lying = [_as_rows(part) for part in parts]
    largest = parts[0].new_empty(_SEARCHES, dtype=torch.float32)
    of_each = [lying[min(number, len(lying) - 1)] for number in range(MOST_PARTS)]
    launch: Any = torch.library.wrap_triton(_largest)
    launch[(_SEARCHES,)](
        *(rows.values for rows in of_each),
        largest,
        *(rows.number for rows in of_each),
        *(rows.width for rows in of_each),
        *(rows.stride for rows in of_each),
        parts=len(lying),
        height=_TILE[0],
        width=_TILE[1],
        num_warps=4,
    )
    return largest


@torch.library.triton_op("fourfold::to_float8", mutates_args=())
def to_float8(
    parts: Sequence[Tensor], largest: Tensor, dtype: torch.dtype, beside: bool, rows: bool, columns: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """values / scale, clamped, in a float8 format; the scale is the largest magnitude over the format's largest number.

    The compiler sees the kernel and launches it as its own; one that it cannot look into costs the host 50 us a call.

    Args:
        parts: of values [M, N], at most `MOST_PARTS`, of one dtype.
        largest: what `largest_magnitudes` found in them.
        dtype: the format.
        beside: the parts lie side by side, [..., n] each, and not one below the other, [..., N] each; dimensions before
            the last are one.
        rows, columns: whether it is wanted as it lies, and transposed.
    Returns:
        [M, N] and [N, M], contiguous, empty where not wanted, and the scale, fp32 [1].
    """
    assert len(parts) <= MOST_PARTS
    lying = [_as_rows(part) for part in parts]
    sizes = [part.width if beside else part.number for part in lying]
    ends = [sum(sizes[: number + 1]) for number in range(len(sizes))]
    num_rows = lying[0].number if beside else ends[-1]
    num_columns = ends[-1] if beside else lying[0].width
    as_it_lies = largest.new_empty((num_rows, num_columns) if rows else (0,), dtype=dtype)
    turned = largest.new_empty((num_columns, num_rows) if columns else (0,), dtype=dtype)
    scale = largest.new_empty(1)
    along = sum(triton.cdiv(size, _BLOCK) for size in sizes)
    grid = (triton.cdiv(num_rows, _BLOCK), along) if beside else (along, triton.cdiv(num_columns, _BLOCK))
    of_each = [min(number, len(lying) - 1) for number in range(MOST_PARTS)]
    launch: Any = torch.library.wrap_triton(_cast)
    launch[grid](
        *(lying[number].values for number in of_each),
        largest,
        as_it_lies,
        turned,
        scale,
        num_rows,
        num_columns,
        *(lying[number].stride for number in of_each),
        *(ends[number] for number in of_each),
        limit=torch.finfo(dtype).max,
        has_rows=rows,
        has_columns=columns,
        beside=beside,
        parts=len(lying),
        block=_BLOCK,
        searches=_SEARCHES,
        num_warps=8,
    )
    return as_it_lies, turned, scale


class _Rows(NamedTuple):
    """A tensor of rows [..., width] that lie `stride` numbers apart and have no gaps."""

    values: Tensor
    number: int
    width: int
    stride: int


def _as_rows(part: Tensor) -> _Rows:
    """A tensor [..., width], copied if its rows do not lie so."""
    if part.stride(-1) != 1 or not all(
        part.shape[dim] == 1 or part.stride(dim) == part.stride(dim + 1) * part.shape[dim + 1]
        for dim in range(part.ndim - 2)
    ):
        part = part.contiguous()
    return _Rows(part, math.prod(part.shape[:-1]), part.shape[-1], part.stride(-2))
