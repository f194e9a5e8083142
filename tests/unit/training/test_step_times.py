"""The time of a step that a run is told to have taken."""

from __future__ import annotations

import pytest

from fourfold.training.step_times import StepTimes


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ([], None),
        ([9.0], 9.0),
        ([9.0, 3.0, 2.0], 3.0),
        ([9.0, 3.0, 2.0, 1.0], 1.0),  # the first three warm up
        ([9.0, 9.0, 9.0, 1.0, 8.0, 2.0], 2.0),
    ],
)
def test_median_when_steps_are_noted_leaves_out_the_first(seconds: list[float], expected: float | None) -> None:
    times = StepTimes()
    for value in seconds:
        times.add(value)
    assert times.median() == expected
