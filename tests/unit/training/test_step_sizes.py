"""What the lengths of samples say of steps and micro-batches."""

from __future__ import annotations

import numpy as np
import pytest

from fourfold.training.step_sizes import StepSizes


def test_sizes_when_samples_are_equal_are_exact() -> None:
    sizes = StepSizes.of(np.full(100, 50), 4)
    assert sizes == StepSizes(longest=50, step=200, smallest=200, mean=200.0)


def test_sizes_when_samples_differ_hold_nearly_all_steps() -> None:
    generator = np.random.default_rng(0)
    lengths = generator.integers(20, 400, 8000)
    sizes = StepSizes.of(lengths, 16)
    steps = lengths.reshape(-1, 16).sum(axis=1)
    assert sizes.mean == pytest.approx(steps.mean())
    assert sizes.longest == lengths.max()
    outside = ((steps > sizes.step) | (steps < sizes.smallest)).sum()
    assert outside <= 3
    assert sizes.step < 1.2 * steps.max()


def test_sizes_when_a_step_takes_all_samples_are_their_sum() -> None:
    assert StepSizes.of(np.array([10, 20, 30]), 3) == StepSizes(longest=30, step=60, smallest=60, mean=60.0)


def test_sizes_when_rows_are_padded_count_each_as_the_longest() -> None:
    assert StepSizes.of(np.array([10, 20, 30]), 3, padded=True).step == 90


@pytest.mark.parametrize(
    ("sizes", "max_tokens", "min_batches", "expected"),
    [
        (StepSizes(100, 800, 800), 1000, 1, 800),  # all at once
        (StepSizes(100, 1500, 1500), 1000, 1, 750),  # two alike
        (StepSizes(100, 1500, 900), 1000, 1, 1000),  # some step has just 1,000
        (StepSizes(100, 800, 800), 1000, 4, 200),  # a pipeline wants four
        (StepSizes(300, 800, 800), 1000, 4, 300),  # a sample is not cut
    ],
)
def test_largest_micro_batch_when_steps_are_cut_is_even(
    sizes: StepSizes, max_tokens: int, min_batches: int, expected: int
) -> None:
    assert sizes.largest_micro_batch(max_tokens, min_batches) == expected
