"""What a training stage is: the rows it needs and its loss. One file per stage; there is one loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from fourfold.dataset.batch import Batch
from fourfold.parallel.loss import Outputs
from fourfold.parallel.terms import LossTerms

RowKind = Literal["text", "chat", "preference", "kto", "prompt"]


class Objective(Protocol):
    """A stage of training.

    Each file of this folder has `ROWS: RowKind` and `build(run) -> Objective`.
    """

    def denominators(self, batches: Sequence[Batch]) -> dict[str, float]:
        """This rank's share of every denominator, over all micro-batches of one optimizer step."""
        ...

    def loss(self, outputs: Outputs, batch: Batch) -> LossTerms:
        """The sums of one micro-batch. Takes outputs, not the model, so that it serves the last pipeline stage."""
        ...
