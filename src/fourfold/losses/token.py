"""Losses over tokens: sums, never means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fourfold.config.schema import Run
from fourfold.dataset.batch import Batch
from fourfold.parallel.loss import Outputs, score_tokens
from fourfold.parallel.terms import TARGET_COUNT, TARGETS, TOKENS, LossTerms, Term


def weighted_sum(nll: Tensor, weights: Tensor) -> Tensor:
    """Sum of weighted token losses.

    Args:
        nll: [N] fp32 negative log-likelihoods.
        weights: [N] fp32.
    Returns:
        scalar fp32.
    """
    return torch.dot(nll, weights)


def router_term(outputs: Outputs, batch: Batch, coefficient: float) -> dict[str, Term]:
    """The term `router` of a model of experts whose balance counts; none otherwise."""
    if not coefficient or outputs.router_loss is None:
        return {}
    return {"router": Term(coefficient * outputs.router_loss * batch.num_tokens, TOKENS)}


@dataclass(frozen=True, slots=True)
class TokenLoss:
    """Cross entropy of the trained tokens, over their summed weight in the whole optimizer step.

    loss = sum_t w_t * -log p(target_t | before t) / sum_t w_t

    With `dynamic` (DFT, arXiv 2508.05629) each term is weighted by p(target_t | before t) as well, which is taken for a
    constant: tokens that the model finds unlikely pull less. The denominator stays, as in LLaMA-Factory, so that

    d loss / d log p_t = -w_t * p_t / sum_t w_t

    Attributes:
        dynamic: the loss of DFT.
        accuracy: also report the share of targets that are the likeliest token.
        router_coefficient: weight of the experts' load-balancing loss, which is computed for each micro-batch and
            averaged over tokens; 0 for none.
    """

    accuracy: bool = False
    dynamic: bool = False
    router_coefficient: float = 0.0

    @property
    def is_fixed(self) -> bool:
        """Whether the loss reads nothing of a batch but its tensors, so that it may be recorded and replayed."""
        return not self.router_coefficient

    def prepare(self, batches: Sequence[Batch], scorer: object) -> list[Batch]:
        """Nothing is needed beside them."""
        return list(batches)

    def denominators(self, batches: Sequence[Batch]) -> dict[str, float]:
        """The summed weight and the number of trained positions, and the number of tokens."""
        return {
            TARGETS: float(sum(float(batch.weights.sum()) for batch in batches)),
            TARGET_COUNT: float(sum(batch.num_targets for batch in batches)),
            TOKENS: float(sum(batch.num_tokens for batch in batches)),
        }

    def loss(self, outputs: Outputs, batch: Batch) -> LossTerms:
        """The terms `nll` and, with experts, `router`; the metric `accuracy`."""
        scores = score_tokens(outputs, batch.targets, with_correct=self.accuracy)
        weights = batch.weights.reshape(-1).index_select(0, scores.positions)
        if self.dynamic:
            weights = weights * torch.exp(-scores.nll.detach())
        terms = {"nll": Term(weighted_sum(scores.nll, weights), TARGETS)}
        terms |= router_term(outputs, batch, self.router_coefficient)
        metrics: dict[str, Term] = {}
        if scores.correct is not None:
            metrics["accuracy"] = Term(scores.correct.sum().float(), TARGET_COUNT)
        return LossTerms(terms, metrics)


def build_token_loss(run: Run) -> TokenLoss:
    """The token loss that a config asks for, the same for every stage that uses it."""
    return TokenLoss(
        accuracy=run.training.compute_accuracy,
        dynamic=run.training.use_dft_loss,
        router_coefficient=run.model.moe_aux_loss_coef or 0.0,
    )
