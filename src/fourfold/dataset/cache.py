"""The cache of tokenised data: folders named by what is in them, written whole or not at all.

A folder is written under a temporary name, synced and renamed, so an interrupted run leaves nothing that looks
finished. A lock makes a second process (another rank, another run) wait for the first and then load what it wrote.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from transformers import PreTrainedTokenizerFast

from fourfold.base.errors import DataError
from fourfold.base.log import get_logger
from fourfold.dataset.storage import STORAGE_VERSION

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = get_logger(__name__)

_PACKAGES = ("fourfold.dataset", "fourfold.dataset.formats", "fourfold.dataset.tool_formats")


def fingerprint_of(facts: Mapping[str, Any]) -> str:
    """A short hash of everything that `facts` (JSON values) says."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:32]


def code_digest() -> str:
    """Hash of the code that turns rows into samples, so that a cache of other code is not taken for its own."""
    digest = hashlib.sha256(str(STORAGE_VERSION).encode())
    for package in _PACKAGES:
        for file in sorted(importlib.resources.files(package).iterdir(), key=lambda file: file.name):
            if file.name.endswith((".py", ".jinja")):
                digest.update(file.read_bytes())
    return digest.hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of everything that decides how text becomes tokens."""
    tokenizer.encode("", add_special_tokens=False)  # resets the padding and truncation that a call may have left
    facts: dict[str, Any] = {
        "class": type(tokenizer).__name__,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "split_special_tokens": tokenizer.split_special_tokens,
    }
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        facts["add_bos_token"] = tokenizer.add_bos_token
        content = tokenizer.backend_tokenizer.to_str()
    else:
        content = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{json.dumps(facts, sort_keys=True)}{content}".encode()).hexdigest()


def load_or_write(folder: Path, write: Callable[[Path], None], *, overwrite: bool = False) -> None:
    """Make sure that a folder is there, written whole.

    Args:
        folder: the folder; it is finished if it exists.
        write: fills an empty folder with what belongs there.
        overwrite: write it anew although it exists.
    Raises:
        DataError: the folder cannot be written, for example because the disk is full.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            if overwrite or not folder.exists():
                _write_whole(folder, write)
            else:
                log.info("Loading tokenised data from %s", folder)
    except OSError as error:
        hint = "Free space, or name another place in FOURFOLD_CACHE or tokenized_path."
        raise DataError(f"tokenised data cannot be written here ({error}). {hint}", file=str(folder)) from error


def _write_whole(folder: Path, write: Callable[[Path], None]) -> None:
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # left by a process that was killed: the lock is ours now
    unfinished.mkdir()
    try:
        write(unfinished)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    if folder.exists():
        shutil.rmtree(folder)
    unfinished.rename(folder)
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
