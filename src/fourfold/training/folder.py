"""The run's folder: who owns it, and what is recorded in it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from fourfold.base.errors import ConfigError
from fourfold.base.log import get_logger
from fourfold.checkpoint.folder import list_checkpoints, prune
from fourfold.checkpoint.resume import check_named
from fourfold.config.schema import Run
from fourfold.training.resumed import check_settings
from fourfold.training.used_folder import PROGRESS, check_unused, holds_run
from fourfold.version import FORMAT_VERSION, SCHEMA_VERSION, __version__

log = get_logger(__name__)

CONFIG = "fourfold_config.yaml"
VERSIONS = "versions.json"
DATASETS = "datasets.json"

_OWN_FILES = (*PROGRESS, CONFIG, VERSIONS, DATASETS)
_PACKAGES = ("torch", "transformers", "peft", "datasets", "tokenizers", "safetensors", "bitsandbytes", "numpy")


def claim(run: Run) -> Path:
    """The run's folder, made if needed; an earlier run is left in it until `begin_anew`.

    It stays this process's until `release`: of two runs that write into one folder neither would leave anything whole.

    Raises:
        ConfigError: another run is at work in it; or it already holds a run, and the config says neither to resume nor
            to overwrite it.
        CheckpointError: the config names a checkpoint that is not there, or goes on from one with other settings.
    """
    output = run.output
    folder = Path(output.output_dir or "")
    check_unused(run)
    check_named(output.resume_from_checkpoint, folder)
    check_settings(run, folder)
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output_dir: {folder} cannot be made ({error.strerror}). Name another folder.") from error
    _lock(folder)
    if is_new:
        _MADE.append(folder)
    prune(folder, None)
    return folder


_LOCKED: dict[tuple[int, int], int] = {}
"""Descriptors of the folders that this process has locked, by device and inode."""
_MADE: list[Path] = []
"""Folders that were not there before this process claimed them."""


def _lock(folder: Path) -> None:
    """Lock a folder; where the system or the file system has no locks nothing is done."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    found = folder.stat()
    place = (found.st_dev, found.st_ino)
    if place in _LOCKED:
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ConfigError(
            f"output_dir: another run is at work in {folder}. Wait for it to end, or name another folder."
        ) from None
    except OSError:
        os.close(descriptor)
        return
    _LOCKED[place] = descriptor


def release() -> None:
    """Let others have what this process has claimed; a new folder into which nothing was written is removed."""
    while _MADE:
        with suppress(OSError):  # it is not empty
            _MADE.pop().rmdir()
    while _LOCKED:
        os.close(_LOCKED.popitem()[1])


def begin_anew(folder: Path, run: Run) -> None:
    """Remove what an earlier run left, and nothing else, if the config says to overwrite it.

    To be called once everything is loaded: a config that does not work must not cost the earlier run.
    """
    if not run.output.overwrite_output_dir or not holds_run(folder):
        return
    log.info("overwrite_output_dir: the earlier run in %s is removed.", folder)
    for _, checkpoint in list_checkpoints(folder):
        shutil.rmtree(checkpoint)
    for name in _OWN_FILES:
        (folder / name).unlink(missing_ok=True)
    for event_file in folder.glob("runs/**/events.out.tfevents.*"):
        event_file.unlink()


def record(folder: Path, run: Run, datasets: Mapping[str, Any], layout: Mapping[str, Any]) -> None:
    """Write the resolved config, the versions and the data sets' fingerprints."""
    text = yaml.safe_dump({"schema_version": SCHEMA_VERSION, **run.flat()}, sort_keys=False, allow_unicode=True)
    (folder / CONFIG).write_text(text, encoding="utf-8")
    (folder / VERSIONS).write_text(json.dumps(versions(), indent=2), encoding="utf-8")
    facts = {"datasets": dict(datasets), "layout": dict(layout)}
    (folder / DATASETS).write_text(json.dumps(facts, indent=2, ensure_ascii=False), encoding="utf-8")


def versions() -> dict[str, Any]:
    """What this process runs: Fourfold, its checkpoint format, Python and the libraries, by name."""
    return {
        "fourfold": __version__,
        "format_version": FORMAT_VERSION,
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
