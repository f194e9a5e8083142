"""Checkpoint folders: written whole or not at all, with a manifest that tells damage from health.

A folder is written under a temporary name beside its place, its files are flushed to the disk, a manifest of sizes
and digests is added, and only then is it renamed. So a folder with its final name was complete when it got it.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from fourfold.base.errors import CheckpointError, FourfoldError
from fourfold.base.units import format_bytes
from fourfold.version import FORMAT_VERSION

MANIFEST = "manifest.json"
Entry = dict[str, Any]
"""Size and digest of a file."""

_NAME = re.compile(r"checkpoint-(\d+)")
_READ_BYTES = 1 << 22
_WRAPPED = re.compile(r"\(os error (\d+)\)")
_OF_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Errors that only writing has."""


def digest(path: Path) -> str:
    """Content hash of a file (xxh3, 128 bits): finds damage, does not resist an attacker."""
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_READ_BYTES):
            state.update(chunk)
    return state.hexdigest()


RESUME_ADVICE = "Free some space, or lower save_total_limit; then start again with resume_from_checkpoint: true."


def write_folder(
    target: Path,
    write: Callable[[Path], Mapping[str, Entry] | None],
    *,
    manifest: bool = True,
    key: str = "output_dir",
    when_full: str = RESUME_ADVICE,
) -> None:
    """Fill a folder by `write(temporary folder)` and put it in its place in one move.

    Args:
        write: fills the folder; may return what the manifest is to say of some files (`entries_of`), so that they need
            not be read again.
        manifest: add the manifest that `verify` reads; a model for others to load has none.
        key: the config key that named the folder, for messages.
        when_full: what to do when the disk is full.
    Raises:
        CheckpointError: the disk is full or cannot be written; nothing is left behind.
    """
    temporary = incomplete(target)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        known = write(temporary)
        if manifest:
            _write_manifest(temporary, known or {})
        let_others_read(temporary)
        _flush(temporary)
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
        _sync(target.parent)
    except BaseException as error:
        problem = _problem_of_disk(error)
        # said before the cleaning, which frees space
        message = None if problem is None else _cannot_write(target, problem, key, when_full)
        shutil.rmtree(temporary, ignore_errors=True)
        if message is None:
            raise
        raise CheckpointError(message) from error


def let_others_read(folder: Path) -> None:
    """Give the weights in a folder the permissions that the system gives a new file; safetensors makes them private."""
    probe = folder / ".mode"
    probe.touch()
    usual = probe.stat().st_mode
    probe.unlink()
    for path in folder.glob("*.safetensors"):
        path.chmod(usual)


def incomplete(target: Path) -> Path:
    """Where a folder is until it is complete."""
    return target.with_name(f".{target.name}.incomplete")


@contextmanager
def failed_writes_told(folder: Path, *, key: str = "output_dir", when_full: str = RESUME_ADVICE) -> Iterator[None]:
    """Tell in one line that `folder` cannot be written, whatever was being written: the disk is full, and the like.

    Args:
        key, when_full: as `write_folder` has them.
    Raises:
        CheckpointError: in place of the system's or a library's error.
    """
    try:
        yield
    except FourfoldError:
        raise
    except Exception as error:
        problem = _problem_of_disk(error)
        if problem is None or not (problem.errno in _OF_WRITING or _is_barred(problem, folder)):
            raise
        raise CheckpointError(_cannot_write(folder, problem, key, when_full)) from error


def _problem_of_disk(error: BaseException) -> OSError | None:
    if isinstance(error, OSError):
        return error
    # safetensors and tokenizers wrap the system's error in one of their own, with Rust's text only
    wrapped = _WRAPPED.search(str(error))
    if wrapped is None:
        return None
    number = int(wrapped.group(1))
    return OSError(number, os.strerror(number))


def _is_barred(problem: OSError, folder: Path) -> bool:
    """Whether a file within a folder may not be written."""
    path = problem.filename
    return isinstance(problem, PermissionError) and isinstance(path, str) and Path(path).is_relative_to(folder)


def _cannot_write(target: Path, error: OSError, key: str, when_full: str) -> str:
    if error.errno == errno.ENOSPC:
        existing = next((p for p in (target.parent, *target.parents) if p.exists()), Path("/"))
        free = format_bytes(shutil.disk_usage(existing).free)
        return f"{target}: the disk is full while saving ({free} free). {when_full}"
    if error.errno == errno.EDQUOT:
        return f"{target}: your quota of the disk is used up while saving. {when_full}"
    if error.errno == errno.EFBIG:
        return (
            f"{target}: a file is larger than allowed (ulimit -f tells the limit). Raise it, or choose another {key}."
        )
    return f"{target}: cannot be written ({error.strerror or error}). Choose another {key}."


def entries_of(folder: Path, paths: Iterable[Path]) -> dict[str, Entry]:
    """What a manifest says of some files of a folder."""
    return {str(p.relative_to(folder)): {"bytes": p.stat().st_size, "xxh3": digest(p)} for p in paths}


def _write_manifest(folder: Path, known: Mapping[str, Entry]) -> None:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    entries = {**known, **entries_of(folder, (p for p in files if str(p.relative_to(folder)) not in known))}
    content = json.dumps({"format_version": FORMAT_VERSION, "files": entries}, indent=1)
    (folder / MANIFEST).write_text(content, encoding="utf-8")


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def verify(folder: Path, *, share: int = 0, of: int = 1) -> None:
    """Check a folder against its manifest.

    Args:
        share, of: read every `of`-th file only, from `share` on; sizes of all are checked. So ranks share the reading.
    Raises:
        CheckpointError: names the first file that is missing, cut short or changed, or the newer format.
    """
    manifest = folder / MANIFEST
    if not manifest.exists():
        raise CheckpointError(f"{folder}: has no {MANIFEST}, so it is not a complete checkpoint of Fourfold.")
    try:
        record = json.loads(manifest.read_text(encoding="utf-8"))
        version, files = record["format_version"], record["files"]
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{manifest}: is damaged ({error}).") from error
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{folder}: has format_version {version}, this Fourfold reads up to {FORMAT_VERSION}. Update Fourfold."
        )
    for index, (name, entry) in enumerate(files.items()):
        path = folder / name
        if not path.exists():
            raise CheckpointError(f"{path}: is missing.")
        if path.stat().st_size != entry["bytes"]:
            raise CheckpointError(f"{path}: has {path.stat().st_size} bytes, {entry['bytes']} were written.")
        if index % of == share and digest(path) != entry["xxh3"]:
            raise CheckpointError(f"{path}: its content is not what was written.")


def list_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """All checkpoints of a run, oldest first, as (step, folder)."""
    if not output_dir.is_dir():
        return []
    found = ((_NAME.fullmatch(p.name), p) for p in output_dir.iterdir() if p.is_dir())
    return sorted((int(match.group(1)), path) for match, path in found if match)


def prune(output_dir: Path, limit: int | None, keep: Path | None = None) -> None:
    """Delete the oldest checkpoints beyond `limit` (never `keep`, the best one) and what a killed save left."""
    for leftover in output_dir.glob(".checkpoint-*.incomplete"):
        shutil.rmtree(leftover, ignore_errors=True)
    if limit is None or limit <= 0:
        return
    old = [path for _, path in list_checkpoints(output_dir) if path != keep]
    excess = len(old) + (keep is not None and keep.exists()) - limit
    for path in old[: max(0, min(excess, len(old) - 1))]:
        shutil.rmtree(path)
