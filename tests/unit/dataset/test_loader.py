"""Steps are a pure function of seed and number."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fourfold.dataset.batch import Example, Sample
from fourfold.dataset.loader import Loader, StepLoader, StreamLoader, epoch_order


@dataclass
class _Source:
    size: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        return Sample({"": Example([index], [index])}, index)


def _take(loader: Loader, count: int, start: int = 0) -> list[list[int]]:
    steps = loader.steps(start)
    return [[sample.index for sample in next(steps).samples] for _ in range(count)]


def test_steps_when_epoch_does_not_divide_takes_the_rest_and_repeats_nothing() -> None:
    loader = StepLoader(_Source(11), 4)
    steps = _take(loader, 6)
    assert [len(step) for step in steps] == [4, 4, 3, 4, 4, 3]
    assert sorted(sum(steps[:3], [])) == sorted(sum(steps[3:], [])) == list(range(11))
    assert steps[:3] != steps[3:]


def test_steps_when_started_in_the_middle_equals_the_whole() -> None:
    loader = StepLoader(_Source(11), 4, seed=7)
    assert _take(loader, 7)[4:] == _take(loader, 3, start=4)


def test_steps_when_not_shuffled_keeps_the_order() -> None:
    assert _take(StepLoader(_Source(5), 2, shuffle=False), 3) == [[0, 1], [2, 3], [4]]


def test_steps_when_several_ranks_cover_the_same_samples() -> None:
    whole = _take(StepLoader(_Source(11), 4), 3)
    parts = [_take(StepLoader(_Source(11), 4, rank=rank, num_ranks=2), 3) for rank in range(2)]
    assert [sorted(a + b) for a, b in zip(*parts, strict=True)] == [sorted(step) for step in whole]


@dataclass
class _Stream:
    """Eleven samples whose number tells the epoch."""

    def epoch(self, number: int) -> Iterator[Sample]:
        for index in range(11):
            yield Sample({"": Example([index], [index])}, 100 * number + index)


def test_stream_steps_when_epoch_does_not_divide_take_the_rest_and_go_on_with_the_next() -> None:
    steps = StreamLoader(_Stream(), 4).steps()
    found = [next(steps) for _ in range(5)]
    assert [[sample.index for sample in step.samples] for step in found] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 10],
        [100, 101, 102, 103],
        [104, 105, 106, 107],
    ]
    assert [(step.step, step.epoch) for step in found] == [(0, 0), (1, 0), (2, 0), (3, 1), (4, 1)]


def test_stream_steps_when_started_in_the_middle_equal_the_whole() -> None:
    loader = StreamLoader(_Stream(), 4)
    assert _take(loader, 7)[4:] == _take(loader, 3, start=4)


def test_stream_steps_when_several_ranks_cover_the_same_samples() -> None:
    whole = _take(StreamLoader(_Stream(), 4), 3)
    parts = [_take(StreamLoader(_Stream(), 4, rank=rank, num_ranks=2), 3) for rank in range(2)]
    assert [sorted(a + b) for a, b in zip(*parts, strict=True)] == whole


def test_epoch_order_when_seed_or_epoch_differs_differs() -> None:
    orders = {tuple(epoch_order(20, epoch, seed=seed, shuffle=True)) for epoch in (0, 1) for seed in (1, 2)}
    assert len(orders) == 4
