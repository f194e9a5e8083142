"""Work beside the training: in order, and no failure is lost."""

from __future__ import annotations

import threading

import pytest

from fourfold.training.background import Background


def test_background_when_a_second_job_comes_waits_for_the_first() -> None:
    background, done, gate = Background(), [], threading.Event()

    def first() -> None:
        gate.wait(10)
        done.append("first")

    background.start(first)
    threading.Timer(0.05, gate.set).start()
    background.start(lambda: done.append("second"))
    background.wait()
    assert done == ["first", "second"]


def test_background_when_a_job_fails_raises_it_once_at_the_next_call() -> None:
    background = Background()

    def fail() -> None:
        raise OSError("no space")

    background.start(fail)
    with pytest.raises(OSError, match="no space"):
        background.start(lambda: None)
    background.wait()
