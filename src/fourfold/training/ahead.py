"""The next step's micro-batches, made while a device still computes the last one's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fourfold.dataset.batch import Batch, Sample
from fourfold.dataset.collate import CutPolicy, cut
from fourfold.dataset.loader import StepSamples


class Ahead:
    """A loader's steps, of which the next one can be asked for early.

    Args:
        steps: in order; may end.
        policy: how samples are cut into micro-batches.
    """

    def __init__(self, steps: Iterator[StepSamples], policy: CutPolicy) -> None:
        self._steps, self._policy = steps, policy
        self._waiting: list[StepSamples] = []
        self._made: tuple[Sequence[Sample], list[Batch]] | None = None

    def next(self) -> StepSamples | None:
        """The next step; None after the last."""
        return self._waiting.pop() if self._waiting else next(self._steps, None)

    def prepare(self) -> None:
        """Read and cut the step that `next` will give."""
        if not self._waiting and (found := next(self._steps, None)) is not None:
            self._waiting.append(found)
            self._made = found.samples, cut(found.samples, self._policy)

    def cut(self, samples: Sequence[Sample]) -> list[Batch]:
        """Micro-batches of a step's samples; those of a prepared step are there already."""
        if self._made is not None and self._made[0] is samples:
            return self._made[1]
        return cut(samples, self._policy)
