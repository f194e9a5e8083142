"""How long optimizer steps took."""

from __future__ import annotations

import statistics
from collections import deque

_WARM_UP = 3
_MOST = 1000


class StepTimes:
    """Seconds of the latest steps; the first few, which make state and find kernels, count only without later ones."""

    def __init__(self) -> None:
        self._count = 0
        self._latest: deque[float] = deque(maxlen=_MOST)

    def add(self, seconds: float) -> None:
        """Note a step."""
        self._count += 1
        if self._count == _WARM_UP + 1:
            self._latest.clear()
        self._latest.append(seconds)

    def median(self) -> float | None:
        """Of the noted steps; None if there are none."""
        return statistics.median(self._latest) if self._latest else None
