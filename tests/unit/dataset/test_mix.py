"""Orders of rows: equal to those of the `datasets` library."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from datasets import Dataset, interleave_datasets

from fourfold.dataset.mix import MixStrategy, mix_order, sample_rows, split_rows, stream_numbers

STOPPING: dict[MixStrategy, Any] = {
    "interleave_under": "first_exhausted",
    "interleave_over": "all_exhausted",
    "interleave_once": "all_exhausted_without_replacement",
}
SIZES = (3, 7, 5)


def library_order(strategy: MixStrategy, probabilities: list[float] | None) -> list[list[int]]:
    sets = [Dataset.from_dict({"at": [[n, row] for row in range(size)]}) for n, size in enumerate(SIZES)]
    mixed = interleave_datasets(sets, probabilities=probabilities, seed=11, stopping_strategy=STOPPING[strategy])
    return list(mixed["at"])


@pytest.mark.parametrize("probabilities", [(), (0.2, 0.5, 0.3)])
@pytest.mark.parametrize("strategy", list(STOPPING))
def test_mix_order_when_interleaved_equals_the_datasets_library(
    strategy: MixStrategy, probabilities: tuple[float, ...]
) -> None:
    order = mix_order(SIZES, strategy, probabilities, seed=11)
    assert order.tolist() == library_order(strategy, list(probabilities) or None)


def test_mix_order_when_concatenated_keeps_the_order() -> None:
    assert mix_order([2, 1], "concat", (), seed=0).tolist() == [[0, 0], [0, 1], [1, 0]]


def test_mix_order_when_a_probability_is_zero_waits_for_the_others_only() -> None:
    order = mix_order(SIZES, "interleave_over", (0.5, 0.5, 0.0), seed=1)
    assert set(order[:, 0].tolist()) == {0, 1}


@pytest.mark.parametrize("val_size", [0.25, 4])
def test_split_rows_when_given_a_share_or_a_number_equals_the_datasets_library(val_size: float) -> None:
    train, held_out = split_rows(11, val_size, seed=3)
    split = Dataset.from_dict({"at": list(range(11))}).train_test_split(test_size=val_size, seed=3)
    assert (train.tolist(), held_out.tolist()) == (list(split["train"]["at"]), list(split["test"]["at"]))


def test_sample_rows_when_more_are_wanted_than_there_are_repeats_some() -> None:
    assert len(set(sample_rows(10, 6, seed=1).tolist())) == 6
    rows = sample_rows(4, 9, seed=1)
    assert sorted(rows[:4].tolist()) == [0, 1, 2, 3]
    assert len(rows) == 9


def test_stream_numbers_when_probabilities_are_given_draws_by_them() -> None:
    turns = stream_numbers(3, (), seed=0)
    assert [next(turns) for _ in range(5)] == [0, 1, 2, 0, 1]
    drawn = stream_numbers(2, (0.9, 0.1), seed=0)
    assert np.mean([next(drawn) for _ in range(2000)]) == pytest.approx(0.1, abs=0.03)
