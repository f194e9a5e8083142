"""Which installed distribution has a package, found once and kept until something is installed or removed.

`importlib.metadata.packages_distributions` reads the files of every installed distribution, and Transformers up to 5.17
asks it as it is imported: 0.1 s of a start where a hundred are installed, 0.5 s where several hundreds are.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest import mock

from fourfold.base.cache import cache_root


def installed_folders() -> list[list[object]]:
    """The folders that packages are imported from, with the moment at which each changed: it does when a distribution
    comes or goes."""
    found: list[list[object]] = [[sys.version, 0]]
    for entry in sys.path:
        with suppress(OSError):
            found.append([entry, Path(entry).stat().st_mtime_ns])
    return found


@contextmanager
def distributions_kept(file: Path | None = None) -> Iterator[None]:
    """Within it `packages_distributions` answers from a file, if nothing has changed since that was written.

    Args:
        file: default: in the folder of caches. One that cannot be read or written costs time, no more.
    """
    look_up = importlib.metadata.packages_distributions
    with mock.patch.object(importlib.metadata, "packages_distributions", lambda: _answer(file, look_up)):
        yield


def _answer(file: Path | None, look_up: Callable[[], Mapping[str, list[str]]]) -> Mapping[str, list[str]]:
    folders = installed_folders()  # before the look-up, which may miss what is installed meanwhile
    with suppress(OSError, RuntimeError, ValueError, KeyError, TypeError):  # RuntimeError: there is no home folder
        file = file or cache_root() / "distributions.json"
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["folders"] == folders:
            return kept["distributions"]
    found = look_up()
    with suppress(OSError, RuntimeError):
        file = file or cache_root() / "distributions.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"folders": folders, "distributions": dict(found)})
        new = file.with_suffix(f".{os.getpid()}")  # put in place at once, since other processes read it
        new.write_text(text, encoding="utf-8")
        new.replace(file)
    return found
