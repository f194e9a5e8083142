"""Losses over tokens: sums, never means."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fourfold.dataset.batch import Batch
from fourfold.parallel.loss import Outputs, token_nll
from fourfold.parallel.terms import TARGETS, LossTerms, Term


def weighted_sum(nll: Tensor, weights: Tensor) -> Tensor:
    """Sum of weighted token losses.

    Args:
        nll: [N] fp32 negative log-likelihoods.
        weights: [N] fp32.
    Returns:
        scalar fp32.
    """
    return torch.dot(nll, weights)


class TokenLoss:
    """Cross entropy of the trained tokens, over their summed weight in the whole optimizer step.

    loss = sum_t w_t * -log p(target_t | before t) / sum_t w_t
    """

    def denominators(self, batches: Sequence[Batch]) -> dict[str, float]:
        """The summed weight of all trained positions."""
        return {TARGETS: float(sum(float(batch.weights.sum()) for batch in batches))}

    def loss(self, outputs: Outputs, batch: Batch) -> LossTerms:
        """One term, `nll`."""
        nll, positions = token_nll(outputs, batch.targets)
        weights = batch.weights.reshape(-1).index_select(0, positions)
        return LossTerms({"nll": Term(weighted_sum(nll, weights), TARGETS)})
