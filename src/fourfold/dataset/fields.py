"""Reading single fields of raw rows, with messages that name the field and what was found."""

from __future__ import annotations

import json
from typing import Any

from fourfold.dataset.formats.interface import BadRow, RawRow


def show(value: Any, limit: int = 60) -> str:
    """A value shortened for a message."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def text_field(raw: RawRow, column: str | None) -> str | None:
    """The text of an optional column; None where the column, the field or the value is missing.

    Raises:
        BadRow: the value is not a text.
    """
    if column is None:
        return None
    value = raw.get(column)
    if value is None or isinstance(value, str):
        return value
    raise BadRow(f"{column!r} must be a text, not {show(value)}")


def needed_text(raw: RawRow, column: str | None, what: str) -> str:
    """The text of a column that the stage needs.

    Raises:
        BadRow: it is missing or not a text.
    """
    if column is None:
        raise BadRow(f"the data set names no column for its {what}")
    value = text_field(raw, column)
    if value is None:
        raise BadRow(f"{column!r} is missing (the {what})")
    return value


def needed_bool(raw: RawRow, column: str | None, what: str) -> bool:
    """The truth value of a column that the stage needs.

    Raises:
        BadRow: it is missing or not true or false.
    """
    value = None if column is None else raw.get(column)
    if not isinstance(value, bool):
        raise BadRow(f"{column!r} must be true or false (the {what}), not {show(value)}")
    return value


def tools_field(raw: RawRow, column: str | None) -> str:
    """Tool descriptions as a JSON text, "" if there are none; lists and mappings are written as JSON."""
    value = None if column is None else raw.get(column)
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False)
    raise BadRow(f"{column!r} must be a JSON list of tools, not {show(value)}")
