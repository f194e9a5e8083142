"""How far the tokenising is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fourfold.base.log import get_logger
from fourfold.base.units import format_duration

log = get_logger(__name__)

_SECONDS_BETWEEN_LINES = 10.0

T = TypeVar("T")


def track(items: Iterable[T], *, title: str, total: int, step: int) -> Iterator[T]:
    """Pass `items` on and tell how far they are.

    Args:
        total: what is counted, in all.
        step: how much of it each item is.
    """
    return _bar(items, title, total, step) if sys.stderr.isatty() else _lines(items, title, total, step)


def _bar(items: Iterable[T], title: str, total: int, step: int) -> Iterator[T]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=total)
        for item in items:
            yield item
            progress.advance(task, step)


def _lines(items: Iterable[T], title: str, total: int, step: int) -> Iterator[T]:
    begun = told = time.monotonic()
    done = 0
    for item in items:
        yield item
        done = min(done + step, total)
        now = time.monotonic()
        if now - told >= _SECONDS_BETWEEN_LINES and done < total:
            told = now
            left = (now - begun) / done * (total - done)
            log.info("%s: %d of %d rows, %s left", title, done, total, format_duration(left))
