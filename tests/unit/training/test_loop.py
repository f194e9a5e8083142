"""The loop waits for a step only where something needs its figures, and tells the same figures all the same."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fourfold.base.errors import RunInterruptedError
from fourfold.base.start_clock import StartClock
from fourfold.parallel.reduce import Reducer
from fourfold.parallel.step import Running, StepResult
from fourfold.trackers.interface import Tracker
from fourfold.training.loop import Loop, LoopSettings
from fourfold.training.schedule import Cadence
from fourfold.training.state import TrainState


class _Step:
    """Notes what it is asked; the loss of step n is n."""

    def __init__(self, device: str) -> None:
        self.seen: list[str] = []
        self.reducer, self.graphs, self._count = Reducer(), None, 0
        self.device = torch.device(device)

    def begin(self, batches: Any, *, before: Any) -> Running:
        self._count += 1
        number = self._count
        self.seen.append(f"begin {number}")

        def read() -> StepResult:
            self.seen.append(f"read {number}")
            return StepResult(terms={"loss": float(number)}, num_tokens=10 * number)

        return Running(10 * number, read)


class _Loader:
    def steps(self, start: int) -> Iterator[Any]:
        for step in range(start, 100):
            yield SimpleNamespace(step=step, samples=(), num_samples=2)


class _Log(Tracker):
    def __init__(self) -> None:
        self.rows: list[tuple[int, float, float]] = []

    def advance(self, step: int) -> None:
        return

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self.rows.append((step, figures["loss"], figures["num_tokens"]))

    def finish(self) -> None:
        return


class _Impatient(Loop):
    """Waits for each step."""

    def _may_read_later(self) -> bool:
        return False


def _run(kind: type[Loop] = Loop, device: str = "cpu") -> tuple[list[str], list[tuple[int, float, float]], TrainState]:
    module, step, log, state = nn.Linear(1, 1), _Step(device), _Log(), TrainState()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    loop = kind(
        settings=LoopSettings(7, 7, 0.0, logging=Cadence(3, at_end=True), evaluation=Cadence(0), saving=Cadence(5)),
        step=step,  # type: ignore[arg-type]
        module=module,
        loader=_Loader(),  # type: ignore[arg-type]
        policy=None,  # type: ignore[arg-type]
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.ConstantLR(optimizer),
        state=state,
        trackers=[log],
        save=lambda: step.seen.append(f"save {state.step}"),  # type: ignore[arg-type,return-value]
        begin_micro_batch=lambda step, number: None,
        clock=StartClock(),
    )
    loop.fit()
    return step.seen, log.rows, state


@pytest.fixture(autouse=True)
def _no_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fourfold.training.ahead.cut", lambda samples, policy: [])


def test_steps_when_nothing_is_due_are_read_once_the_next_one_is_begun() -> None:
    seen, _, _ = _run()
    assert seen == [
        *("begin 1", "read 1"),  # the first tells that all works
        *("begin 2", "begin 3", "read 2", "read 3"),  # 3 is logged
        *("begin 4", "begin 5", "read 4", "read 5", "save 5"),
        *("begin 6", "read 6", "begin 7", "read 7", "save 7"),
    ]


@pytest.mark.parametrize(("step", "advice"), [(4, "Go on with"), (7, "No step is left: resume_from_checkpoint=true")])
def test_run_when_stopped_advises_by_what_is_left(step: int, advice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    after = Loop._after_step

    def signalled(self: Loop, signal_number: int) -> None:
        after(self, signal.SIGINT if self.state.step == step else 0)

    monkeypatch.setattr(Loop, "_after_step", signalled)
    with pytest.raises(RunInterruptedError, match=f"^Stopped at step {step} of 7; saved as .*[.] {advice}"):
        _run()


def test_steps_when_a_gpu_has_them_are_logged_once_the_next_one_is_begun() -> None:
    seen, rows, _ = _run(device="cuda")
    assert seen == [
        *("begin 1", "read 1", "begin 2", "begin 3", "read 2", "begin 4", "read 3"),  # 3 is logged
        *("begin 5", "read 4", "read 5", "save 5"),
        *("begin 6", "begin 7", "read 6", "read 7", "save 7"),
    ]
    assert rows == _run()[1]


def test_figures_when_steps_are_read_later_are_the_same() -> None:
    later, rows, state = _run()
    at_once, same, other = _run(_Impatient)
    assert rows == same == [(3, 2.0, 60.0), (6, 5.0, 210.0), (7, 7.0, 280.0)]
    assert at_once[:4] == ["begin 1", "read 1", "begin 2", "read 2"]
    assert later != at_once
    assert (state.loss_sum, state.step, state.num_samples) == (other.loss_sum, other.step, other.num_samples)
