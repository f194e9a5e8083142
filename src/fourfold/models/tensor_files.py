"""Tensors in safetensors files, read by rectangles, so that no tensor need be in memory whole."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from fourfold.parallel.whole import Source

_BLOCK_BYTES = 16 << 20
"""Of a tensor, what is read at once."""


class NamedSource(Source, Protocol):
    """A source that tells what it has."""

    @property
    def names(self) -> Sequence[str]:
        """Of all tensors."""
        ...


class Renamed:
    """A source under other names.

    Args:
        names: of all that is to be had, by the new names, in `source`.
    """

    def __init__(self, source: NamedSource, names: Mapping[str, str]) -> None:
        self._source, self._names = source, names

    @property
    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self._names)

    def __contains__(self, name: object) -> bool:
        """Whether there is such a tensor."""
        return name in self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor."""
        return self._source.shape(self._names[name])

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor."""
        return self._source.dtype(self._names[name])

    def read_into(self, target: Tensor, name: str, offsets: tuple[int, ...]) -> None:
        """Copy a rectangle."""
        self._source.read_into(target, self._names[name], offsets)


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


@dataclass(frozen=True, slots=True)
class _Entry:
    """Where a tensor lies in a file: from byte `start`, row after row."""

    path: Path
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class TensorFiles:
    """The tensors of some safetensors files.

    They are read and not mapped: what is mapped counts as memory of the process, by as much as the system sees fit.

    Raises:
        SafetensorError: a file is damaged.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._entries: dict[str, _Entry] = {}
        for path in paths:
            starts = _starts(path)
            with safe_open(path, framework="pt") as file:  # which also checks the table of contents
                for name in file.keys():  # noqa: SIM118 (not a mapping)
                    outline = file.get_slice(name)
                    shape = tuple(outline.get_shape())
                    dtype = (outline[:0] if shape else file.get_tensor(name)).dtype
                    self._entries[name] = _Entry(path, starts[name], shape, dtype)

    @property
    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self._entries)

    def __contains__(self, name: object) -> bool:
        """Whether there is such a tensor."""
        return name in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor."""
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor."""
        return self._entries[name].dtype

    def read_into(self, target: Tensor, name: str, offsets: tuple[int, ...]) -> None:
        """Copy a rectangle, in blocks of whole rows: columns lie scattered over the file.

        Raises:
            EOFError: the file has become shorter.
        """
        entry = self._entries[name]
        width = math.prod(entry.shape[1:])
        row_bytes = width * entry.dtype.itemsize
        at = entry.start + (offsets[0] if offsets else 0) * row_bytes
        columns = tuple(slice(start, start + size) for start, size in zip(offsets[1:], target.shape[1:], strict=True))
        rows = max(_BLOCK_BYTES // max(row_bytes, 1), 1)
        with entry.path.open("rb", buffering=0) as file:
            file.seek(at)
            for block in target.split(rows) if offsets else (target,):
                count = block.shape[:1]
                read = torch.empty((*count, *entry.shape[1:]), dtype=entry.dtype)
                _read_exactly(file, read.reshape(-1).view(torch.uint8).numpy().data)
                block.copy_(read[(slice(None), *columns)] if offsets else read)


def _starts(path: Path) -> dict[str, int]:
    """The byte of a file at which each tensor begins.

    Source: https://github.com/huggingface/safetensors#format
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        table = json.loads(file.read(size))
    return {name: 8 + size + entry["data_offsets"][0] for name, entry in table.items() if name != "__metadata__"}


def _read_exactly(file: FileIO, into: memoryview) -> None:
    done = 0
    while done < len(into):
        count = file.readinto(into[done:])
        if not count:
            raise EOFError(f"{file.name}: the file ends too early")
        done += count
