"""A Triton kernel that squares and sums large tensors, one read each.

PyTorch's norm of many tensors reads 2.4 TB/s on an H200, whose memory gives 4.3 (docs/lab-notes.md).

Imported only where it runs: on CUDA, where PyTorch brings Triton along.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

_BLOCK = 2048
_BLOCKS = 8
"""Blocks of a program, one after the other."""


@triton.jit(do_not_specialize=["num"])
def _square_sums(x, found, num, block: tl.constexpr, blocks: tl.constexpr):  # no annotations but constexpr
    start = tl.program_id(0).to(tl.int64) * (block * blocks)  # a tensor may have more than 2^31 numbers
    total = tl.zeros((block,), tl.float32)
    x += start
    if start + block * blocks <= num:
        for step in tl.static_range(blocks):
            numbers = tl.load(x + step * block + tl.arange(0, block)).to(tl.float32)
            total += numbers * numbers
    else:
        for step in tl.static_range(blocks):
            place = step * block + tl.arange(0, block)
            numbers = tl.load(x + place, mask=place < num - start, other=0.0).to(tl.float32)
            total += numbers * numbers
    tl.store(found + tl.program_id(0), tl.sum(total, 0))


def square_sums(tensors: Sequence[Tensor]) -> Tensor:
    """Parts, fp32 [any number], of the sum of the squares of contiguous tensors on one GPU, always the same ones."""
    counts = [triton.cdiv(tensor.numel(), _BLOCK * _BLOCKS) for tensor in tensors]
    # where each tensor's parts begin is a multiple of 16 bytes, as the compiler expects it
    found = torch.zeros(sum(-(-count // 4) * 4 for count in counts), dtype=torch.float32, device=tensors[0].device)
    launch: Any = _square_sums
    start = 0
    for tensor, count in zip(tensors, counts, strict=True):
        assert tensor.is_contiguous()
        if count:
            launch[(count,)](tensor, found[start:], tensor.numel(), _BLOCK, _BLOCKS)
        start += -(-count // 4) * 4
    return found
