"""What a training stage is: its loss. One file per stage; there is one loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from fourfold.dataset.batch import Batch
from fourfold.parallel.loss import Outputs
from fourfold.parallel.step import Scorer
from fourfold.parallel.terms import LossTerms


class Objective(Protocol):
    """A stage of training.

    Each file of this folder has `build(run) -> Objective`. What its rows are, `dataset/stage_rows.py` says.
    """

    def prepare(self, batches: Sequence[Batch], scorer: Scorer) -> list[Batch]:
        """The micro-batches of a step, on the host, with what the loss needs beside them (`Batch.extras`).

        All ranks are here with equally many. `scorer` runs the model without a gradient: under a reference, say.
        """
        ...

    def denominators(self, batches: Sequence[Batch]) -> dict[str, float]:
        """This rank's share of every denominator, over all micro-batches of one optimizer step."""
        ...

    def loss(self, outputs: Outputs, batch: Batch) -> LossTerms:
        """The sums of one micro-batch. Takes outputs, not the model, so that it serves the last pipeline stage."""
        ...
