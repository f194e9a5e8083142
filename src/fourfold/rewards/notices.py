"""Warnings about single completions that do not flood the log of a long run."""

from __future__ import annotations

import time
from collections.abc import Callable

from fourfold.base.log import get_logger

_PAUSE_SECONDS = 60.0
_LONGEST = 200
_START = 60

log = get_logger(__name__)


class Notices:
    """The warnings of one reward: at most one line a minute, the rest counted.

    Args:
        clock: seconds from any fixed moment.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last: float | None = None
        self._untold = 0

    def tell(self, message: str, num_completions: int) -> None:
        """Warn, or if that was done less than a minute ago, count the completions for the next line.

        Args:
            message: one line that ends in a stop.
            num_completions: how many the message speaks of.
        """
        now = self._clock()
        if self._last is not None and now - self._last < _PAUSE_SECONDS:
            self._untold += num_completions
            return
        more = f" So did {self._untold} more since the last such line." if self._untold else ""
        log.warning("%s%s", message, more)
        self._last, self._untold = now, 0


def shown_error(error: BaseException) -> str:
    """An error with its kind, in one line of bounded length."""
    return _cut(" ".join(repr(error).split()), _LONGEST)


def start_of(completion: str) -> str:
    """The start of a completion in quotes, in one line."""
    return repr(_cut(completion, _START))


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[:length] + "..."
