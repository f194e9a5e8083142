"""Fourfold's own training loop around a clock instead of the user's trackers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fourfold.config.schema import Run
from fourfold.parallel.mesh import local_device, single
from fourfold.trackers.interface import Tracker
from fourfold.training import folder
from fourfold.training.assemble import Parts, load_parts
from fourfold.training.fit import build_loop, run_facts
from fourfold.training.loop import Loop
from fourfold.training.schedule import plan_steps
from fourfold.training.state import TrainState
from step_clock import StepClock


class ClockTracker(Tracker):
    """Gives a clock the beat of Fourfold's loop."""

    def __init__(self, state: TrainState, clock: StepClock, max_steps: int) -> None:
        self._state, self._clock, self._tokens, self._max_steps = state, clock, 0, max_steps

    def advance(self, step: int) -> None:
        self._clock.end(self._state.num_tokens - self._tokens)
        self._tokens = self._state.num_tokens
        if step < self._max_steps:
            self._clock.begin()

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        if "loss" in figures:
            self._clock.steps[step - 1].loss = figures["loss"]
            self._clock.steps[step - 1].grad_norm = figures["grad_norm"]

    def finish(self) -> None:
        return


@dataclass
class Prepared:
    """A loaded run whose loop has not begun."""

    parts: Parts
    loop: Loop
    clock: StepClock

    def fit(self) -> None:
        """Train to the end of the budget."""
        self.clock.begin()
        self.loop.fit()


def prepare(run: Run, turn: Callable[[], None] = lambda: None, clock: StepClock | None = None) -> Prepared:
    """Load what `fourfold train` would load, and build the same loop.

    Args:
        turn: called before each step, outside the measured time.
        clock: times the steps; None for one that has `turn`.
    """
    parts = load_parts(run, folder.claim(run), single(local_device(run.training.use_cpu)))
    assert parts.data.train is not None, "the config names a data set"
    num_samples = len(parts.data.train)
    budget = plan_steps(run.training, num_samples, parts.mesh.layout.dp)
    state, clock = TrainState(), clock or StepClock(turn)
    tracker = ClockTracker(state, clock, budget.max_steps)
    loop, _ = build_loop(parts, budget, state, [tracker], run_facts(parts, num_samples, budget))
    return Prepared(parts, loop, clock)
