"""Tokenised data under a path of the user's choice (`tokenized_path`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fourfold.base.errors import DataError
from fourfold.base.log import get_logger
from fourfold.dataset.storage import TokenisedDataset

log = get_logger(__name__)

TRAIN = "train"
"""What the training set is saved as; the others are evaluated."""

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


def load_saved(
    root: Path, made_with: Callable[[str], Mapping[str, Any]], *, answered: bool = False
) -> dict[str, TokenisedDataset]:
    """The data sets of a folder, by name.

    Args:
        made_with: what the data set of a name is made with in this run; told apart from what is there.
        answered: the model answers the rows that are evaluated (`predict_with_generate`).
    Raises:
        DataError: the data was made for another tokenizer, template or kind of stage, or cannot be answered.
    """
    names = json.loads((root / _MARKER).read_text(encoding="utf-8"))["names"]
    found = {name: TokenisedDataset(root / name) for name in names}
    for name, data in found.items():
        if answered and name != TRAIN:
            _check_answerable(data.facts["settings"], root, name)
        _compare(data.facts, made_with(name), root)
    log.info("Using the tokenised data at %s", root)
    return found


def _check_answerable(settings: Mapping[str, Any], root: Path, name: str) -> None:
    """Refuse saved rows that the model cannot answer.

    Args:
        settings: what shaped their sequences.
    Raises:
        DataError: they are packed, or their prompts are trained, so that nothing tells a prompt from its answer.
    """
    for key in ("packing", "train_on_prompt"):
        if settings.get(key):
            raise DataError(
                f"tokenized_path: {name} was made with {key}: true, so its rows cannot be answered, as "
                "predict_with_generate asks. Name another folder, or give `overwrite_cache: true` to make it anew.",
                file=str(root),
            )


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
