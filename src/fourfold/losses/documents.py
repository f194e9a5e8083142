"""What losses on whole answers are told of a micro-batch: which documents belong together, and their reference.

Shape legend: B rows, S positions, D documents, P samples of two sequences (pairs).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fourfold.config.schema import Run
from fourfold.dataset.batch import IGNORE_INDEX, Batch
from fourfold.dataset.collate import pairs_of
from fourfold.parallel.step import Scorer

PAIRS = "pairs"
"""Denominator: samples of the step. Also in `Batch.extras`: [P, 2] int64, their documents."""
COUNTS, REFERENCE = "counts", "reference"
"""In `Batch.extras`: [P, 2] fp32, trained tokens, and log-probabilities under the reference."""


def reference_name(role: str) -> str:
    """The name among a sample's numbers of the reference's log-probability of one of its sequences."""
    return f"reference_{role}"


def pairs_tensor(batch: Batch) -> Tensor:
    """[P, 2] int64: the documents of each sample."""
    return torch.tensor(pairs_of(batch), dtype=torch.int64).reshape(-1, 2)


def count_targets(batch: Batch) -> Tensor:
    """[D] fp32: trained tokens of each document of a whole micro-batch."""
    trained = batch.document_ids[batch.targets != IGNORE_INDEX].long()
    return torch.bincount(trained, minlength=len(batch.lengths)).float()


def begins_as_base(run: Run) -> bool:
    """Whether the model with its adapters off is the one that the training starts from."""
    return run.tuning.finetuning_type == "lora" and not run.tuning.pissa_init


def stores_reference(run: Run) -> bool:
    """Whether the reference's log-probabilities are computed before the training and come with the samples.

    Adapters that begin as nothing need none of it: with them off the model is its own reference, at any time.
    """
    preference = run.preference
    return preference.ref_model is not None or preference.precompute_ref_log_probs or not begins_as_base(run)


def stored_logps(batch: Batch, roles: tuple[str, str]) -> Tensor:
    """[D] fp32 from the samples' numbers; 0 for what only fills up."""
    found = torch.zeros(len(batch.lengths))
    for document, (_, role) in enumerate(batch.samples):
        numbers = batch.extras.get(reference_name(roles[role]))
        if numbers is not None and document < len(numbers):
            found[document] = numbers[document]
    return found


def reference_logps(batches: Sequence[Batch], roles: tuple[str, str], scorer: Scorer, *, stored: bool) -> list[Tensor]:
    """For each micro-batch the log-probabilities of its documents under the reference, [D] fp32.

    Those that come with the samples are on the host, others where `Scorer.document_logps` leaves them.

    Args:
        roles: names of a sample's two sequences.
        stored: they come with the samples; otherwise the model is asked, its adapters off, by all ranks.
    """
    if stored:
        return [stored_logps(batch, roles) for batch in batches]
    return scorer.document_logps(batches, reference=True)
