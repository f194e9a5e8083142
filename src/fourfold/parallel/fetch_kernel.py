"""A Triton kernel that fetches rows of a table in pinned host memory.

Imported only where it runs: on CUDA, where PyTorch brings Triton along.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

_COLUMNS = 1024


@triton.jit
def _fetch(table, rows, out, width, columns: tl.constexpr):  # no annotations but constexpr: the compiler reads them
    number = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * columns + tl.arange(0, columns)
    row = tl.load(rows + number)
    numbers = tl.load(table + row * width + column, mask=column < width)
    tl.store(out + number * width + column, numbers, mask=column < width)


def fetch_rows(table: Tensor, rows: Tensor) -> Tensor:
    """Rows [N] int64 on a GPU of a table [V, H] in pinned host memory: [N, H] on that GPU.

    The device reads over PCIe what it needs, and the host does nothing, so that a graph can record it.
    """
    assert table.is_pinned(), "a device cannot read memory that the system may move"
    out = torch.empty(len(rows), table.shape[1], dtype=table.dtype, device=rows.device)
    launch: Any = _fetch
    launch[(len(rows), triton.cdiv(table.shape[1], _COLUMNS))](table, rows, out, table.shape[1], columns=_COLUMNS)
    return out
