"""A Triton kernel that casts a matrix to float8 as it lies and transposed, in one pass over it.

Products in float8 take a first operand row by row and a second one column by column, so the operands of a backward
pass are laid out anew. What the compiler makes of that writes single bytes far apart: on an H100 such kernels took as
long as float8 saved.

Imported only where it runs: on CUDA, where PyTorch brings Triton along.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

_BLOCK = 128
"""Rows and columns of one program: a line of bytes of each layout fills a transfer of the GPU's memory."""


@triton.jit
def _cast(  # no annotations but constexpr: the compiler reads them
    values,
    amax,
    rows,
    columns,
    num_rows,
    num_columns,
    stride,
    limit: tl.constexpr,
    has_rows: tl.constexpr,
    has_columns: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    column = tl.program_id(1).to(tl.int64) * block + tl.arange(0, block)
    is_there = (row < num_rows)[:, None] & (column < num_columns)[None, :]
    found = tl.load(values + row[:, None] * stride + column[None, :], mask=is_there, other=0.0).to(tl.float32)
    factor = limit / tl.maximum(tl.load(amax), 1e-12)
    narrow = tl.clamp(found * factor, -limit, limit).to(rows.dtype.element_ty)
    if has_rows:
        tl.store(rows + row[:, None] * num_columns + column[None, :], narrow, mask=is_there)
    if has_columns:
        turned = (column < num_columns)[:, None] & (row < num_rows)[None, :]
        # read again, from the cache, since turning a tile of fp32 by tl.trans gave wrong numbers (docs/lab-notes.md)
        again = tl.load(values + row[None, :] * stride + column[:, None], mask=turned, other=0.0).to(tl.float32)
        narrow = tl.clamp(again * factor, -limit, limit).to(columns.dtype.element_ty)
        tl.store(columns + column[:, None] * num_rows + row[None, :], narrow, mask=turned)


@torch.library.triton_op("fourfold::to_float8", mutates_args=())
def to_float8(values: Tensor, amax: Tensor, dtype: torch.dtype, rows: bool, columns: bool) -> tuple[Tensor, Tensor]:
    """values * limit / amax, clamped, in a float8 format, whose largest number `limit` is.

    The compiler sees the kernel and launches it as its own; one that it cannot look into costs the host 50 us a call.

    Args:
        values: [M, N].
        amax: fp32, the largest magnitude of values.
        dtype: the format.
        rows, columns: whether it is wanted as it lies, and transposed.
    Returns:
        [M, N] and [N, M], contiguous; empty where not wanted.
    """
    if values.stride(1) != 1:
        values = values.contiguous()
    num_rows, num_columns = values.shape
    as_it_lies = values.new_empty((num_rows, num_columns) if rows else (0,), dtype=dtype)
    turned = values.new_empty((num_columns, num_rows) if columns else (0,), dtype=dtype)
    grid = (triton.cdiv(num_rows, _BLOCK), triton.cdiv(num_columns, _BLOCK))
    launch: Any = torch.library.wrap_triton(_cast)
    launch[grid](
        values,
        amax,
        as_it_lies,
        turned,
        num_rows,
        num_columns,
        values.stride(0),
        limit=torch.finfo(dtype).max,
        has_rows=rows,
        has_columns=columns,
        block=_BLOCK,
        num_warps=8,
    )
    return as_it_lies, turned
