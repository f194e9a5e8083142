"""Short forms in which the tables of other tools' keys say what becomes of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fourfold.config.key import Status, Translation, key


def translated(default: Any, help: str, to: Callable[[Any], Translation], note: str, **spec: Any) -> Any:
    """Declare a key of another tool; `to` turns its value into ours, `note` names the keys it becomes."""
    return key(default, help, status=Status.MAPPED, to=to, note=note, **spec)


def renamed(default: Any, help: str, ours: str, **spec: Any) -> Any:
    """Declare another name of one of our keys."""
    return translated(default, help, lambda value: Translation({ours: value}), ours, **spec)


def switch(help: str, **ours: Any) -> Any:
    """Declare a switch that stands for settings of ours when it is on."""
    listed = ", ".join(f"{name}: {str(value).lower()}" for name, value in ours.items())
    return translated(False, help, lambda _: Translation(ours), listed)


def settled(default: Any, help: str, note: str, **spec: Any) -> Any:
    """Declare a key that has nothing to choose here; `note` says what is done whatever its value."""
    return key(default, help, status=Status.MAPPED, note=note, **spec)


def refused(default: Any, reason: str, help: str = "") -> Any:
    """Declare a key that is out of scope: any value but its default is an error that says `reason`."""
    return key(default, help or "Not supported.", status=Status.REFUSED, note=reason)
