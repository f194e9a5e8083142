"""The time, processor time and memory of every optimizer step; needs neither torch nor Fourfold."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any


@dataclass
class StepFigures:
    """One optimizer step.

    Attributes:
        seconds: wall time.
        cpu_seconds: processor time of the whole process, all threads.
        tokens: input tokens without padding.
        peak_rss_bytes: largest resident set of the process so far.
        loss: None where the step was not logged; a logged one may be the mean over the steps since the last.
    """

    step: int
    seconds: float
    cpu_seconds: float
    tokens: int
    peak_rss_bytes: int
    loss: float | None = None
    grad_norm: float | None = None


@dataclass
class StepClock:
    """Times steps; `turn` is called before each of them, outside the measured time."""

    turn: Callable[[], None] = lambda: None
    steps: list[StepFigures] = field(default_factory=list)
    _wall: float = 0.0
    _cpu: float = 0.0

    def begin(self) -> None:
        """Wait for the turn and start the clock of the next step."""
        self.turn()
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def end(self, tokens: int) -> StepFigures:
        """Stop the clock and note the step."""
        seconds, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        self.steps.append(StepFigures(len(self.steps) + 1, seconds, cpu, tokens, peak_rss_bytes()))
        return self.steps[-1]


def peak_rss_bytes() -> int:
    """The largest resident set that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def counted(steps: Sequence[StepFigures]) -> Sequence[StepFigures]:
    """All steps but the first, which pays for warming up; the first too if there is no other."""
    return steps[1:] or steps


def summary(steps: Sequence[StepFigures]) -> dict[str, Any]:
    """Medians over the counted steps, and every step's figures."""
    chosen = counted(steps)
    return {
        "tokens_per_sec": median(s.tokens / s.seconds for s in chosen),
        "cpu_us_per_token": 1e6 * median(s.cpu_seconds / s.tokens for s in chosen),
        "s_per_step": median(s.seconds for s in chosen),
        "mean_s_per_step": sum(s.seconds for s in chosen) / len(chosen),
        "tokens_per_step": sum(s.tokens for s in chosen) / len(chosen),
        "peak_rss_gib": steps[-1].peak_rss_bytes / 2**30,
        "steps": [asdict(s) for s in steps],
    }
