"""Rectangles of tensors read from safetensors files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fourfold.models import tensor_files
from fourfold.models.tensor_files import TensorFiles

_TENSORS = {
    "matrix": torch.arange(35.0).reshape(5, 7),
    "cube": torch.arange(24).reshape(2, 3, 4).to(torch.bfloat16),
    "vector": torch.arange(6, dtype=torch.int32),
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 4),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(_TENSORS, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("block_bytes", [1, 60, 1 << 20])
@pytest.mark.parametrize(
    ("name", "offsets", "sizes"),
    [
        ("matrix", (0, 0), (5, 7)),
        ("matrix", (1, 2), (3, 4)),
        ("cube", (1, 0, 1), (1, 3, 2)),
        ("vector", (2,), (3,)),
        ("vector", (2,), (0,)),
        ("scalar", (), ()),
        ("empty", (0, 1), (0, 2)),
    ],
)
def test_read_into_copies_the_rectangle(
    name: str,
    offsets: tuple[int, ...],
    sizes: tuple[int, ...],
    block_bytes: int,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tensor_files, "_BLOCK_BYTES", block_bytes)
    files, whole = TensorFiles([path]), _TENSORS[name]
    assert files.shape(name) == tuple(whole.shape)
    assert files.dtype(name) == whole.dtype
    target = torch.full(sizes, -1, dtype=whole.dtype)
    files.read_into(target, name, offsets)
    assert torch.equal(target, whole[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))])


def test_read_into_converts_to_the_targets_dtype(path: Path) -> None:
    target = torch.empty(2, 3, 4, dtype=torch.float32)
    TensorFiles([path]).read_into(target, "cube", (0, 0, 0))
    assert torch.equal(target, _TENSORS["cube"].float())


def test_read_into_when_the_file_was_cut_says_so(path: Path) -> None:
    files = TensorFiles([path])
    path.write_bytes(path.read_bytes()[:-8])
    last = max((name for name in files.names if files.shape(name)), key=lambda name: files._entries[name].start)
    with pytest.raises(EOFError, match="ends too early"):
        files.read_into(torch.empty(files.shape(last), dtype=files.dtype(last)), last, (0,) * len(files.shape(last)))
