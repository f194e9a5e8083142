"""Tokenised data under a path of the user's choice (`tokenized_path`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fourfold.base.errors import DataError
from fourfold.base.log import get_logger
from fourfold.dataset.storage import TokenisedDataset

log = get_logger(__name__)

_MARKER = "fourfold_data.json"
_FOREIGN = ("dataset_dict.json", "state.json")


def save_marker(root: Path) -> None:
    """Mark a folder of data sets as whole."""
    names = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    (root / _MARKER).write_text(json.dumps({"format_version": 1, "names": names}), encoding="utf-8")


def is_saved(root: Path) -> bool:
    """Whether the folder holds saved data.

    Raises:
        DataError: it holds something else.
    """
    if (root / _MARKER).exists():
        return True
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        foreign = any((root / name).exists() for name in _FOREIGN)
        what = "data that the `datasets` library saved" if foreign else "something else than tokenised data"
        raise DataError(f"tokenized_path: the path holds {what}. Name a new folder.", file=str(root))
    return False


def load_saved(root: Path, made_with: Mapping[str, Any]) -> dict[str, TokenisedDataset]:
    """The data sets of a folder, by name.

    Args:
        made_with: what data of this run is made with; told apart from what is there.
    Raises:
        DataError: the data was made for another tokenizer, template or kind of stage.
    """
    names = json.loads((root / _MARKER).read_text(encoding="utf-8"))["names"]
    found = {name: TokenisedDataset(root / name) for name in names}
    for data in found.values():
        _compare(data.facts, made_with, root)
    log.info("Using the tokenised data at %s", root)
    return found


def _compare(saved: Mapping[str, Any], wanted: Mapping[str, Any], root: Path) -> None:
    for key in ("tokenizer", "template"):
        if saved[key] != wanted[key]:
            raise DataError(
                f"tokenized_path: the data was made with another {key}. Name another folder, or give "
                "`overwrite_cache: true` to make it anew.",
                file=str(root),
            )
    differing = {
        key: (saved["settings"].get(key), value)
        for key, value in wanted["settings"].items()
        if saved["settings"].get(key) != value
    }
    if "kind" in differing:
        raise DataError(
            f"tokenized_path: the data is of kind {differing['kind'][0]!r}, the stage needs {differing['kind'][1]!r}. "
            "Name another folder.",
            file=str(root),
        )
    for key, (there, here) in differing.items():
        log.warning(
            "tokenized_path: the data there was made with %s %s; %s of this run has no effect.", key, there, here
        )
