"""Checkpoint folders are whole or not there, and damage is named."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fourfold.base.errors import CheckpointError
from fourfold.checkpoint.folder import MANIFEST, failed_writes_told, list_checkpoints, prune, verify, write_folder
from fourfold.checkpoint.resume import find_checkpoint


def _write(folder: Path) -> None:
    (folder / "a.bin").write_bytes(b"0123456789")
    (folder / "sub").mkdir()
    (folder / "sub" / "b.json").write_text("{}")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with checkpoints 5, 10 and 15."""
    for step in (5, 10, 15):
        write_folder(tmp_path / f"checkpoint-{step}", _write)
    return tmp_path


def test_write_folder_when_done_verifies(run: Path) -> None:
    verify(run / "checkpoint-10")
    assert [step for step, _ in list_checkpoints(run)] == [5, 10, 15]


def test_write_folder_when_writing_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        _write(folder)
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        write_folder(tmp_path / "checkpoint-1", fail)
    assert list(tmp_path.iterdir()) == []


def test_write_folder_when_disk_is_full_says_so(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        with Path("/dev/full").open("wb", buffering=0) as device:
            device.write(b"x")

    with pytest.raises(CheckpointError, match="disk is full"):
        write_folder(tmp_path / "checkpoint-1", fail)
    assert list(tmp_path.iterdir()) == []


def _write_in_place(target: Path, write: Callable[[Path], None]) -> None:
    target.mkdir()
    with failed_writes_told(target):
        write(target)


@pytest.mark.parametrize("writes", ["a library", "the system"])
@pytest.mark.parametrize("way", [write_folder, _write_in_place])
def test_folder_when_a_file_is_larger_than_allowed_says_so(tmp_path: Path, writes: str, way: Any) -> None:
    def write(folder: Path) -> None:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            if writes == "a library":
                save_file({"a": torch.zeros(1000)}, folder / "a.safetensors")
            (folder / "a.bin").write_bytes(bytes(4000))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with pytest.raises(CheckpointError, match=r"out: a file is larger than allowed .*choose another output_dir\."):
        way(tmp_path / "out", write)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("I/O error: Disk quota exceeded (os error 122)"), "your quota of the disk is used up"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "the disk is full while saving"),
        (RuntimeError("I/O error: Read-only file system (os error 30)"), "cannot be written .Read-only file system"),
        (PermissionError(13, "Permission denied", "/out/x"), "cannot be written .Permission denied"),
    ],
)
def test_failed_writes_when_a_library_wraps_them_are_told(error: Exception, message: str) -> None:
    with pytest.raises(CheckpointError, match=f"^/out: {message}"), failed_writes_told(Path("/out")):
        raise error


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied", "/in/x"), ConnectionError("x")])
def test_failed_writes_when_it_is_something_else_let_it_pass(error: Exception) -> None:
    with pytest.raises(type(error)), failed_writes_told(Path("/out")):
        raise error


def test_verify_when_a_file_is_cut_short_names_it(run: Path) -> None:
    (run / "checkpoint-15" / "a.bin").write_bytes(b"0123")
    with pytest.raises(CheckpointError, match=r"a\.bin: has 4 bytes, 10 were written"):
        verify(run / "checkpoint-15")


def test_verify_when_a_byte_differs_names_it(run: Path) -> None:
    (run / "checkpoint-15" / "a.bin").write_bytes(b"0123456780")
    with pytest.raises(CheckpointError, match=r"a\.bin: its content is not"):
        verify(run / "checkpoint-15")


def test_verify_when_a_file_is_missing_names_it(run: Path) -> None:
    (run / "checkpoint-15" / "sub" / "b.json").unlink()
    with pytest.raises(CheckpointError, match=r"b\.json: is missing"):
        verify(run / "checkpoint-15")


def test_verify_when_format_is_newer_says_so(run: Path) -> None:
    manifest = run / "checkpoint-15" / MANIFEST
    manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 99'))
    with pytest.raises(CheckpointError, match="format_version 99"):
        verify(run / "checkpoint-15")


def test_find_checkpoint_when_newest_is_damaged_offers_the_one_before(run: Path) -> None:
    (run / "checkpoint-15" / "a.bin").unlink()
    with pytest.raises(CheckpointError, match=r"a\.bin: is missing\. The one before it is whole: .*checkpoint-10"):
        find_checkpoint(True, run)
    assert find_checkpoint(str(run / "checkpoint-10"), run) == run / "checkpoint-10"


def test_find_checkpoint_when_path_does_not_exist_lists_the_known(run: Path) -> None:
    with pytest.raises(CheckpointError, match=r"does not exist.*checkpoint-5.*checkpoint-15"):
        find_checkpoint(str(run / "checkpoint-7"), run)


def test_find_checkpoint_when_there_is_none_starts_anew(tmp_path: Path) -> None:
    assert find_checkpoint(True, tmp_path) is None


def test_prune_when_limited_keeps_newest_and_best(run: Path) -> None:
    prune(run, 2, keep=run / "checkpoint-5")
    assert [step for step, _ in list_checkpoints(run)] == [5, 15]


def test_prune_when_limit_is_one_keeps_newest_beside_best(run: Path) -> None:
    prune(run, 1, keep=run / "checkpoint-5")
    assert [step for step, _ in list_checkpoints(run)] == [5, 15]


def test_prune_when_a_save_was_killed_removes_its_leftover(run: Path) -> None:
    leftover = run / ".checkpoint-20.incomplete"
    leftover.mkdir()
    prune(run, None)
    assert not leftover.exists()
