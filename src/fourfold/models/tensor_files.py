"""Tensors in safetensors files, read by rectangles, so that no tensor need be in memory whole."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from fourfold.parallel.whole import Source

_BLOCK_BYTES = 64 << 20
"""Of a tensor, what is mapped at once: mapped pages count as memory of the process."""


class NamedSource(Source, Protocol):
    """A source that tells what it has."""

    @property
    def names(self) -> Sequence[str]:
        """Of all tensors."""
        ...


class HostTensors:
    """Tensors in host memory."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    @property
    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self._tensors)

    def __contains__(self, name: object) -> bool:
        """Whether there is such a tensor."""
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor."""
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor."""
        return self._tensors[name].dtype

    def read_into(self, target: Tensor, name: str, offsets: tuple[int, ...]) -> None:
        """Copy a rectangle."""
        tensor = self._tensors[name]
        for dim, (offset, size) in enumerate(zip(offsets, target.shape, strict=True)):
            tensor = tensor.narrow(dim, offset, size)
        target.copy_(tensor)


class TensorFiles:
    """The tensors of some safetensors files.

    What is mapped of an open file counts as memory of this process, so a file is opened anew after so many bytes.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._paths: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._open: tuple[Path, Any] | None = None
        self._mapped_bytes = 0
        for path in paths:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a mapping)
                    self._paths[name] = path
                    self._shapes[name] = tuple(file.get_slice(name).get_shape())

    def _file(self, name: str) -> Any:
        path = self._paths[name]
        if self._open is None or self._open[0] != path or self._mapped_bytes > _BLOCK_BYTES:
            self._open, self._mapped_bytes = (path, safe_open(path, framework="pt")), 0
        return self._open[1]

    @property
    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self._paths)

    def __contains__(self, name: object) -> bool:
        """Whether there is such a tensor."""
        return name in self._paths

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor."""
        file = self._file(name)
        return (file.get_slice(name)[:0] if self._shapes[name] else file.get_tensor(name)).dtype

    def read_into(self, target: Tensor, name: str, offsets: tuple[int, ...]) -> None:
        """Copy a rectangle, in blocks of rows: columns lie scattered over all pages of the file."""
        if not offsets:
            target.copy_(self._file(name).get_tensor(name))
            return
        row_bytes = math.prod(self._shapes[name][1:]) * self.dtype(name).itemsize
        rows = max(_BLOCK_BYTES // max(row_bytes, 1), 1)
        columns = tuple(slice(start, start + size) for start, size in zip(offsets[1:], target.shape[1:], strict=True))
        start = offsets[0]
        for block in target.split(rows):
            block.copy_(self._file(name).get_slice(name)[(slice(start, start + len(block)), *columns)])
            self._mapped_bytes += len(block) * row_bytes
            start += len(block)
