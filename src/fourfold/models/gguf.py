"""Reading a GGUF file: its metadata and its tensors.

The header is parsed here, in a tenth of a second; the `gguf` package's own reader makes several arrays of every
string and needs seconds for a vocabulary. The block formats are the package's: `gguf.dequantize` is the reference.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from fourfold.base.errors import ModelError

Scalar: TypeAlias = int | float | bool | str
Value: TypeAlias = Scalar | list["Value"]

_MAGIC = b"GGUF"
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies.

    Attributes:
        shape: as torch has it, rows first (the file lists the dims the other way round).
        kind: number of the block format (`gguf.GGMLQuantizationType`).
        offset: first byte, from the start of the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """The header of a GGUF file."""

    path: Path
    metadata: Mapping[str, Value]
    tensors: Mapping[str, TensorInfo]

    @property
    def architecture(self) -> str:
        """The value of `general.architecture`, e.g. `llama`."""
        return str(self.metadata.get("general.architecture", ""))

    def number(self, key: str, default: float | None = None) -> float:
        """A numeric entry of the architecture, e.g. `number("block_count")` for `llama.block_count`.

        Raises:
            ModelError: the entry is missing and no default is given.
        """
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ModelError(
                f"model_name_or_path: {self.path} has no number {self.architecture}.{key}. Use another file."
            )
        return value


class _Cursor:
    """Reads the header's values one after another."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.position = data, 0

    def scalar(self, code: str) -> int | float | bool:
        (value,) = struct.unpack_from("<" + code, self.data, self.position)
        self.position += struct.calcsize("<" + code)
        return value

    def count(self, code: str = "Q") -> int:
        return int(self.scalar(code))

    def string(self) -> str:
        length = self.count()
        start, self.position = self.position, self.position + length
        return self.data[start : self.position].decode("utf-8", errors="replace")

    def value(self, kind: int) -> Value:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalar(_SCALARS[kind])
        kind, length = self.count("I"), self.count()
        if kind not in _SCALARS:
            return [self.value(kind) for _ in range(length)]
        code = f"<{length}{_SCALARS[kind]}"
        values = list(struct.unpack_from(code, self.data, self.position))
        self.position += struct.calcsize(code)
        return values


def read_gguf(path: Path) -> GgufFile:
    """Parse the header of a GGUF file (version 2 or 3, little endian).

    Raises:
        ModelError: there is no such file, or it is not a complete GGUF file.
    """
    if not path.is_file():
        raise ModelError(f"model_name_or_path: there is no file {path}. Give the path of a .gguf file that exists.")
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(path, data)
    except (struct.error, KeyError, ValueError) as error:
        raise ModelError(f"model_name_or_path: {path} is damaged or no GGUF file ({error}). Fetch it again.") from error


def _parse(path: Path, data: mmap.mmap) -> GgufFile:
    if data[:4] != _MAGIC:
        raise ValueError("it does not start with GGUF")
    cursor = _Cursor(data)
    cursor.position = 4
    version = cursor.count("I")
    if version not in _VERSIONS:
        raise ValueError(f"version {version}, known are {_VERSIONS}")
    num_tensors, num_entries = cursor.count(), cursor.count()
    metadata: dict[str, Value] = {}
    for _ in range(num_entries):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.count("I"))
    infos: list[TensorInfo] = []
    for _ in range(num_tensors):
        name = cursor.string()
        dims = [cursor.count() for _ in range(cursor.count("I"))]
        infos.append(TensorInfo(name, tuple(reversed(dims)), cursor.count("I"), cursor.count()))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int):
        raise TypeError(f"general.alignment is {alignment!r}")
    start = -(-cursor.position // alignment) * alignment
    tensors = {info.name: TensorInfo(info.name, info.shape, info.kind, info.offset + start) for info in infos}
    return GgufFile(path, metadata, tensors)


def gguf_package() -> ModuleType:
    """The `gguf` package, which is optional.

    Raises:
        ModelError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise ModelError("model_name_or_path: a .gguf file needs the gguf package. Run `pip install gguf`.") from error
    return gguf


def dequantize(file: GgufFile, info: TensorInfo, rows: Sequence[int] | None = None) -> Tensor:
    """A tensor of the file as fp32, whatever its block format.

    Args:
        rows: of a matrix, which rows to read; None reads the whole tensor.
    Raises:
        ModelError: the block format is not known to the installed `gguf`, or the file ends too early.
    """
    gguf = gguf_package()
    try:
        kind = gguf.GGMLQuantizationType(info.kind)
        block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        # Blocks lie within a row (along the last dim), so rows can be read by themselves.
        row_bytes = info.shape[-1] // block_size * block_bytes
        num_rows = math.prod(info.shape[:-1])
        raw = np.memmap(file.path, dtype=np.uint8, mode="r", offset=info.offset, shape=(num_rows, row_bytes))
        wanted = raw if rows is None else raw[list(rows)]
        values = wanted.view(np.float32) if kind == gguf.GGMLQuantizationType.F32 else gguf.dequantize(wanted, kind)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise ModelError(
            f"model_name_or_path: tensor {info.name} of {file.path} cannot be read ({error}). "
            "Fetch the file again, or use one with another quantisation."
        ) from error
    shape = info.shape if rows is None else (len(rows), *info.shape[1:])
    return torch.from_numpy(np.require(values, np.float32, ["C", "W"]).reshape(shape))
