"""Reward modelling: of two answers to a prompt the better one is to get the higher value (Bradley-Terry)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from fourfold.config.schema import Run
from fourfold.dataset.batch import Batch
from fourfold.losses.documents import PAIRS, pairs_tensor
from fourfold.losses.reward import reward_loss
from fourfold.losses.token import router_term
from fourfold.objectives.interface import Objective
from fourfold.parallel.loss import Outputs, document_values, loss_share
from fourfold.parallel.step import Scorer
from fourfold.parallel.terms import TOKENS, LossTerms, Term


@dataclass(frozen=True, slots=True)
class RewardObjective:
    """The mean loss of the step's pairs; an answer's reward is the value at its last token.

    Attributes:
        router_coefficient: weight of the experts' load-balancing loss.
    """

    router_coefficient: float = 0.0

    def prepare(self, batches: Sequence[Batch], scorer: Scorer) -> list[Batch]:
        """Which documents are a pair."""
        return [replace(batch, extras={**batch.extras, PAIRS: pairs_tensor(batch)}) for batch in batches]

    def denominators(self, batches: Sequence[Batch]) -> dict[str, float]:
        """The number of pairs, and of tokens."""
        return {
            PAIRS: float(sum(len(batch.extras[PAIRS]) for batch in batches)),
            TOKENS: float(sum(batch.num_tokens for batch in batches)),
        }

    def loss(self, outputs: Outputs, batch: Batch) -> LossTerms:
        """The terms `preference` and, with experts, `router`; rewards and accuracy as metrics."""
        chosen, rejected = document_values(outputs, batch)[batch.extras[PAIRS]].unbind(1)
        found = reward_loss(chosen, rejected)
        share = loss_share(outputs)
        terms = {"preference": Term(found.losses.sum() * share, PAIRS)}
        terms |= router_term(outputs, batch, self.router_coefficient)
        correct = (1 + found.margins.sign()) / 2  # without a preference it is right half of the time
        metrics = {
            "rewards/chosen": chosen.detach(),
            "rewards/rejected": rejected.detach(),
            "rewards/margins": found.margins,
            "rewards/accuracies": correct,
        }
        if not torch.is_grad_enabled():
            metrics["accuracy"] = correct  # an evaluation's name for it, in LLaMA-Factory's terms
        return LossTerms(terms, {name: Term(each.sum() * share, PAIRS) for name, each in metrics.items()})


def build(run: Run) -> Objective:
    """The objective of stage `rm`."""
    return RewardObjective(router_coefficient=run.model.moe_aux_loss_coef or 0.0)
