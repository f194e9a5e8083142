"""What is said of a key that is unknown or whose value is not valid."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic_core import ErrorDetails

from fourfold.base import registry
from fourfold.config.key import Status
from fourfold.config.schema import Key, table


def unknown_key(name: str) -> str:
    """The message for a key that there is not, with the nearest that there are."""
    close = nearest_keys(name, (key.name for key in table().values() if key.spec.status is not Status.REFUSED))
    hint = f"Did you mean {' or '.join(close)}?" if close else "`fourfold help` lists the keys."
    return f"{name}: there is no such key. {hint}"


def nearest_keys(name: str, keys: Iterable[str]) -> list[str]:
    """Up to three keys like `name`: by its words (`epochs`), its initials (`lr`) or its spelling (`cutof_len`)."""
    keys, word = list(keys), name.lower().replace("-", "_")
    within = [key for key in keys if f"_{word}_" in f"_{key}_"]
    initials = [key for key in keys if word == "".join(part[:1] for part in key.split("_"))]
    return list(dict.fromkeys([*initials, *registry.nearest(name, keys), *within]))[:3]


def wanted(key: Key) -> str:
    """The values a key takes, in words, e.g. `a number above 0`."""
    spec = key.spec
    words = key.kind.words()
    if spec.low is not None:
        words += f" {'above' if spec.open_low else 'of at least'} {_number(spec.low)}"
    if spec.high is not None:
        joined = " and" if spec.low is not None else ""
        words += f"{joined} {'below' if spec.open_high else 'at most'} {_number(spec.high)}"
    return f"{words} or null" if key.kind.nullable else words


def invalid(key: Key, value: Any, error: ErrorDetails) -> str:
    """The message for a value of a wrong type or out of range."""
    bounds = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")
    wrong = "is out of range" if error["type"] in bounds else "is not valid"
    return f"{key.name}: {shown(key, value)} {wrong}. Use {wanted(key)}."


def shown(key: Key, value: Any) -> str:
    """A value of a key as its user would write it; secrets are not shown."""
    if key.spec.secret:
        return "(hidden)"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return repr(",".join(map(str, value)))
    return repr(value)


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else f"{value:g}"
