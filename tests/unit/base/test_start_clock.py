"""The clock of a start."""

from __future__ import annotations

import logging
import pickle
import time

import pytest

from fourfold.base.start_clock import StartClock


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the system's monotonic clock shows, to be moved by the test."""
    shown = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: shown[0])
    return shown


def test_start_clock_when_phases_end_counts_the_time_between_them(now: list[float]) -> None:
    clock = StartClock(now[0])
    now[0] = 103.0
    clock.lap("imports")
    now[0] = 103.75
    clock.lap("data")
    now[0] = 104.0
    clock.lap("imports")
    assert clock.phases == {"imports": 3.25, "data": 0.75}


def test_start_clock_when_it_ends_tells_once_and_leaves_out_what_took_no_time(
    now: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fourfold")
    clock = StartClock(now[0])
    now[0] = 102.0
    clock.lap("imports")
    now[0] = 102.04
    clock.lap("reference")
    now[0] = 110.0
    clock.end("first step")
    clock.end("first step")
    assert caplog.messages == ["Start: 10.0 s (imports 2.0 s, first step 8.0 s)"]


def test_start_clock_when_of_a_process_counts_what_ran_before(
    now: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "process_time", lambda: 0.25)
    clock = StartClock.of_process()
    clock.lap("config")
    assert clock.phases == {"config": 0.25}


def test_start_clock_when_sent_to_a_worker_goes_on(now: list[float]) -> None:
    clock = StartClock(now[0])
    now[0] = 101.0
    clock.lap("data")
    arrived = pickle.loads(pickle.dumps(clock))
    now[0] = 104.0
    arrived.lap("workers")
    assert arrived.phases == {"data": 1.0, "workers": 3.0}
