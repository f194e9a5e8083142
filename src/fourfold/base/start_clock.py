"""Where the time from the command to the end of the first step goes."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from fourfold.base.log import get_logger

log = get_logger(__name__)

_LEAST_S = 0.05
"""A phase that took less is not named."""


@dataclass(slots=True)
class StartClock:
    """Seconds of each phase of a start, in order; told in one line when the first step is done.

    It may be handed to another process of the same machine, whose monotonic clock is the same.

    Attributes:
        last: when the latest phase ended, in seconds of the system's monotonic clock.
        phases: seconds by name.
        ended: whether the start is over.
    """

    last: float = field(default_factory=time.monotonic)
    phases: dict[str, float] = field(default_factory=dict)
    ended: bool = False

    @classmethod
    def of_process(cls) -> StartClock:
        """One that runs since this process began: until now it computed, so the processor's time tells for how long."""
        return cls(time.monotonic() - time.process_time())

    def lap(self, phase: str) -> None:
        """Count all the time since the latest phase as `phase`; one that comes again is added to."""
        now = time.monotonic()
        self.phases[phase] = self.phases.get(phase, 0.0) + now - self.last
        self.last = now

    def end(self, phase: str) -> None:
        """The start is over with `phase`: tell of it. Called again, it does nothing."""
        if self.ended:
            return
        self.lap(phase)
        self.ended = True
        log.info("%s", self.describe())

    def describe(self) -> str:
        """For example `Start: 12.4 s (imports 3.1 s, data 0.8 s, model 4.0 s, first step 4.5 s)`."""
        named = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.phases.items() if seconds >= _LEAST_S)
        total = f"Start: {sum(self.phases.values()):.1f} s"
        return f"{total} ({named})" if named else total
