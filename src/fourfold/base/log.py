"""Logging: INFO from rank 0 only, warnings and errors from every rank with the rank named.

The filter sits on the handler, so call sites stay plain: `log = get_logger(__name__)` and `log.info(...)`.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

_ROOT = "fourfold"
_HUSHED = (
    # Warns on every import that a faster CPU kernel for 4 bits cannot be fetched from the hub; it is not needed.
    "bitsandbytes.backends.cpu.ops",
)
"""Loggers of libraries whose warnings say nothing that a user has to settle."""


def get_logger(name: str) -> logging.Logger:
    """The logger of a module; `name` is the module's `__name__`."""
    return logging.getLogger(name)


@contextmanager
def told_elsewhere(told: bool = True) -> Iterator[None]:
    """Leave out information and warnings that another process of this job gives; errors are shown."""
    root = logging.getLogger(_ROOT)
    level = root.level
    if told:
        root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)


class _RankFilter(logging.Filter):
    """Reads the rank for every line: a worker is forked with the handlers of the process that starts it."""

    def filter(self, record: logging.LogRecord) -> bool:
        rank, several = _rank(), os.environ.get("WORLD_SIZE", "1") != "1"
        loud = record.levelno >= logging.WARNING
        record.rank_prefix = f"[rank {rank}] " if loud and several else ""
        return loud or rank == 0


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        message = super().format(record)
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        return f"{getattr(record, 'rank_prefix', '')}{level}{message}"


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Looks standard error up for every line: a progress bar takes it over for a while, to print lines above itself."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


def setup_logging(*, verbose: bool = False, file: Path | None = None) -> None:
    """Send Fourfold's log to standard error (and to `file`), filtered by this process's rank.

    Reads `RANK` and `WORLD_SIZE` as a launcher sets them. Calling it again replaces the handlers.
    """
    for name in _HUSHED:
        logging.getLogger(name).setLevel(logging.ERROR)
    root = logging.getLogger(_ROOT)
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    root.setLevel(logging.DEBUG if verbose else logging.INFO)
    root.propagate = False
    handlers: list[logging.Handler] = [_StderrHandler()]
    if file is not None and _rank() == 0:
        handlers.append(logging.FileHandler(file, encoding="utf-8"))
    for handler in handlers:
        handler.addFilter(_RankFilter())
        handler.setFormatter(_Formatter("%(message)s"))
        root.addHandler(handler)
