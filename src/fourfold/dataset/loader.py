"""Which samples make up which optimizer step: a pure function of seed, sizes and step, so any step can be resumed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import Protocol

import numpy as np

from fourfold.dataset.batch import Sample


class SampleSource(Protocol):
    """Random access to tokenised samples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


class EpochStream(Protocol):
    """Samples that can only be read one after the other."""

    def epoch(self, number: int) -> Iterator[Sample]:
        """The samples of an epoch, from 0; the same ones whenever it is asked for."""
        ...


@dataclass(frozen=True, slots=True)
class StepSamples:
    """The samples of one optimizer step.

    Attributes:
        step: number of the step, from 0.
        epoch: epoch it belongs to, from 0.
        samples: this data-parallel rank's samples, in order.
        num_samples: samples of the step over all ranks.
    """

    step: int
    epoch: int
    samples: list[Sample]
    num_samples: int


class Loader(Protocol):
    """Gives the samples of every optimizer step."""

    def steps(self, start: int = 0) -> Iterator[StepSamples]:
        """All steps from number `start` on, without end."""
        ...


def epoch_order(num_samples: int, epoch: int, *, seed: int, shuffle: bool) -> np.ndarray:
    """Order of the samples in an epoch: int64 [num_samples], a permutation keyed by (seed, epoch)."""
    if not shuffle:
        return np.arange(num_samples)
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_samples)


@dataclass(frozen=True)
class StepLoader:
    """Steps over a data set; the last step of an epoch takes what is left.

    Attributes:
        source: the samples.
        samples_per_step: samples of one optimizer step over all data-parallel ranks.
        seed: keys the order together with the epoch.
        shuffle: a new order for every epoch; otherwise the order of the source.
        rank: this data-parallel rank; it takes every `num_ranks`-th sample of a step.
        num_ranks: data-parallel ranks.
    """

    source: SampleSource
    samples_per_step: int
    seed: int = 42
    shuffle: bool = True
    rank: int = 0
    num_ranks: int = 1

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch."""
        return math.ceil(len(self.source) / self.samples_per_step)

    def steps(self, start: int = 0) -> Iterator[StepSamples]:
        """All steps from number `start` on, without end; nothing is read for the skipped ones."""
        step = start
        while True:
            epoch, within = divmod(step, self.steps_per_epoch)
            order = epoch_order(len(self.source), epoch, seed=self.seed, shuffle=self.shuffle)
            for first in range(within * self.samples_per_step, len(order), self.samples_per_step):
                chosen = order[first : first + self.samples_per_step]
                mine = chosen[self.rank :: self.num_ranks]
                yield StepSamples(step, epoch, [self.source[int(i)] for i in mine], len(chosen))
                step += 1


@dataclass(frozen=True)
class StreamLoader:
    """Steps over a stream; the last step of an epoch takes what is left.

    Attributes:
        stream: the samples, shuffled by itself.
        samples_per_step, rank, num_ranks: as StepLoader has them.
    """

    stream: EpochStream
    samples_per_step: int
    rank: int = 0
    num_ranks: int = 1

    def steps(self, start: int = 0) -> Iterator[StepSamples]:
        """All steps from number `start` on, without end.

        The steps before are made and thrown away: where they end in the files, only making them tells.
        """
        step = 0
        for epoch in count():
            samples = self.stream.epoch(epoch)
            while chosen := list(islice(samples, self.samples_per_step)):
                if step >= start:
                    yield StepSamples(step, epoch, chosen[self.rank :: self.num_ranks], len(chosen))
                step += 1
