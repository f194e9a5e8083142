"""Tokens of a run's samples and steps: what must fit, and what a step is likely to be."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class StepSizes:
    """Tokens of one data-parallel rank.

    Attributes:
        longest: of the longest sample, which cannot be cut.
        step: of an optimizer step, the largest to be expected.
        smallest: of an optimizer step, the smallest to be expected; 0 where it is not known.
        mean: of an optimizer step on average; 0 where it is not known.
    """

    longest: int
    step: int
    smallest: int = 0
    mean: float = 0.0

    @classmethod
    def of(cls, lengths: np.ndarray, samples: int, *, padded: bool = False) -> StepSizes:
        """From the lengths of all samples.

        A step's tokens are the sum of n lengths: by the central limit theorem of mean n m and deviation sqrt(n) s, and
        the largest of k such sums is expected at sqrt(2 ln k) deviations (of normal ones, for large k).

        Args:
            lengths: tokens of each sample, at least one.
            samples: of a step, on one data-parallel rank.
            padded: rows are as long as the longest of their micro-batch; the largest step counts them all so.
        """
        longest, mean = int(lengths.max()), samples * float(lengths.mean())
        steps = max(len(lengths) / samples, 1.0)
        spread = float(lengths.std()) * math.sqrt(2 * samples * math.log(steps))
        return cls(
            longest=longest,
            step=samples * longest if padded else int(min(mean + spread, samples * longest)),
            smallest=int(max(mean - spread, samples * int(lengths.min()))),
            mean=mean,
        )

    @classmethod
    def at_most(cls, longest: int, samples: int) -> StepSizes:
        """Where lengths are not known: every sample as long as may be."""
        step = longest * samples
        return cls(longest, step, step, float(step))

    def largest_micro_batch(self, max_tokens: int, min_batches: int = 1) -> int:
        """Tokens of the largest micro-batch to be expected; those of a step are as even as samples allow.

        Args:
            max_tokens: of a micro-batch.
            min_batches: of a step.
        """
        least = max(min_batches, 1)
        count = max(math.ceil(self.step / max_tokens), least)
        if count > least and self.smallest <= (count - 1) * max_tokens:
            return max(self.longest, max_tokens)  # some step just fills one micro-batch fewer
        return max(self.longest, math.ceil(self.step / count))
