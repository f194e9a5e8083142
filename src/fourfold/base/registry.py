"""Open folders: the file name is the config value, nothing is registered at import."""

from __future__ import annotations

import difflib
import importlib
import importlib.resources
from collections.abc import Iterable
from types import ModuleType

from fourfold.base.errors import ConfigError

_NOT_ENTRIES = {"__init__", "interface"}


def names(package: str, suffix: str = ".py") -> list[str]:
    """The entries of an open folder, sorted: the stems of its files, e.g. `names("fourfold.objectives")`.

    The folder is listed, its files are not imported.
    """
    folder = importlib.resources.files(package)
    found = (entry.name.removesuffix(suffix) for entry in folder.iterdir() if entry.name.endswith(suffix))
    return sorted(name for name in found if name not in _NOT_ENTRIES)


def load(package: str, name: str, *, key: str) -> ModuleType:
    """Import the entry `name` of an open folder.

    Args:
        key: the config key that named it, for the message.
    Raises:
        ConfigError: no such entry; the message lists the valid names and the nearest one.
    """
    valid = names(package)
    if name not in valid:
        raise ConfigError(unknown(key, name, valid))
    return importlib.import_module(f"{package}.{name}")


def nearest(name: str, valid: Iterable[str], limit: int = 3) -> list[str]:
    """The valid names most like `name`, best first; empty when none is close."""
    return difflib.get_close_matches(name, list(valid), n=limit, cutoff=0.6)


def unknown(key: str, value: str, valid: Iterable[str], *, advice: str = "") -> str:
    """The message for a value that is not in a list: names the nearest ones, then all.

    Args:
        advice: what to do where the value is no slip; then a name with other digits (`gemma4` for `gemma3`), which is
            another thing, is not taken for one.
    """
    options = sorted(valid)
    close = nearest(value, options)
    if advice:
        close = [name for name in close if _digits(name) == _digits(value)]
        advice = f" {advice}"
    hint = f" Did you mean {' or '.join(close)}?" if close else advice
    return f"{key}: {value!r} is not known.{hint} Use one of: {', '.join(options)}."


def _digits(name: str) -> str:
    return "".join(filter(str.isdigit, name))
