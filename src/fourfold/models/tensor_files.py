"""Tensors in safetensors files, read by rectangles, so that no tensor need be in memory whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from fourfold.parallel.whole import Source


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

    def read(self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
        """A rectangle, as a view."""
        tensor = self._tensors[name]
        for dim, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
            tensor = tensor.narrow(dim, offset, size)
        return tensor


class TensorFiles:
    """The tensors of some safetensors files.

    A file is open only while it is read: what is mapped of an open one counts as this process's memory.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._paths: dict[str, Path] = {}
        for path in paths:
            with safe_open(path, framework="pt") as file:
                self._paths.update(dict.fromkeys(file.keys(), path))

    @property
    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self._paths)

    def __contains__(self, name: object) -> bool:
        """Whether there is such a tensor."""
        return name in self._paths

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor."""
        with safe_open(self._paths[name], framework="pt") as file:
            return tuple(file.get_slice(name).get_shape())

    def read(self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
        """A rectangle, as a view of the mapped file: copy it, and let it go."""
        with safe_open(self._paths[name], framework="pt") as file:
            if not sizes:
                return file.get_tensor(name)
            return file.get_slice(name)[
                tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))
            ]

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor."""
        with safe_open(self._paths[name], framework="pt") as file:
            return file.get_slice(name)[:0].dtype if file.get_slice(name).get_shape() else file.get_tensor(name).dtype
