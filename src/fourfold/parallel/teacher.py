"""What a step is told by a second model, which is split over the same ranks and never changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from fourfold.dataset.batch import Batch
from fourfold.parallel.vocabulary import VocabularyShare


@dataclass(frozen=True, slots=True)
class TeacherStates:
    """What a second, frozen model makes of some micro-batches, so that its logits can be made chunk by chunk.

    Attributes:
        hidden: for each micro-batch the last hidden states of the trained positions that this rank has,
            [N, hidden size] on the host; empty on ranks without the last pipeline stage, which see no loss.
        head: hidden states [..., hidden size] -> logits; None where `hidden` is empty.
        vocabulary: which tokens these are, as `Outputs.vocabulary`.
    """

    hidden: tuple[Tensor, ...] = ()
    head: Callable[[Tensor], Tensor] | None = None
    vocabulary: VocabularyShare | None = None


class Teacher(Protocol):
    """A second model, split over the same ranks."""

    def states(self, batches: Sequence[Batch]) -> TeacherStates:
        """What it makes of the micro-batches, no gradient; all ranks must call, with equally many."""
        ...
