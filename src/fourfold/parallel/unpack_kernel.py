"""A Triton kernel that unpacks nf4 weights, whose scales are plain or packed as well.

bitsandbytes takes up to two kernels and an addition, and reaches half of a card's bandwidth. A weight is unpacked twice
in each layer and micro-batch, so this is a tenth of a step of QLoRA.

Imported only where it runs: on CUDA, where PyTorch brings Triton along.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

_BLOCKS = 32
"""Blocks of one program; of 64 numbers each."""


@triton.jit
def _unpack(  # no annotations but constexpr: the compiler reads them
    packed,
    codes,
    scales,
    scale_table,
    offset,
    table,
    out,
    num_blocks,
    blocks: tl.constexpr,
    half: tl.constexpr,
    outer: tl.constexpr,
):
    block = tl.program_id(0) * blocks + tl.arange(0, blocks)
    is_there = block < num_blocks
    if outer == 0:
        scale = tl.load(scales + block, mask=is_there, other=0.0)
    else:
        code = tl.load(codes + block, mask=is_there, other=0).to(tl.int32)
        scale = tl.load(scale_table + code) * tl.load(scales + block // outer, mask=is_there, other=0.0)
        scale = scale + tl.load(offset)
    scale = scale[:, None]
    start, there = block.to(tl.int64)[:, None], is_there[:, None]
    pair = tl.load(packed + start * half + tl.arange(0, half)[None, :], mask=there, other=0).to(tl.int32)
    both = tl.interleave(tl.load(table + (pair >> 4)) * scale, tl.load(table + (pair & 15)) * scale)
    place = start * (2 * half) + tl.arange(0, 2 * half)[None, :]
    tl.store(out + place, both.to(out.dtype.element_ty), mask=there)


def unpack_nf4(tensors: Sequence[Tensor], sizes: Sequence[int], out: Tensor) -> None:
    """Write the weight [rows, columns] to `out`, contiguous, the numbers those that bitsandbytes gives.

    Args:
        tensors: bytes in whatever dtype they are stored, the first of two numbers being the high half, and [16] fp32,
            the numbers that halves of bytes stand for. Between them a scale for each block, fp32; or, where these are
            packed: codes (uint8, indices into the table), what a block of codes is multiplied by (fp32), the table
            ([256] fp32), and what is added (fp32).
        sizes: rows, columns, numbers of a block, and codes of a block of codes, or 0.
    """
    rows, columns, block, outer = sizes
    packed, *between, table = tensors
    codes, scales, scale_table, offset = between if outer else [between[0]] * 4
    num_blocks = rows * columns // block
    grid = (triton.cdiv(num_blocks, _BLOCKS),)
    data = packed.reshape(-1).view(torch.uint8)
    launch: Any = _unpack
    launch[grid](
        data, codes, scales, scale_table, offset, table, out, num_blocks, blocks=_BLOCKS, half=block // 2, outer=outer
    )
