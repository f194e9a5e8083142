"""Distillation: a student learns a teacher's distribution over the vocabulary at every trained position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from fourfold.config.schema import Run
from fourfold.dataset.batch import Batch
from fourfold.losses.teacher import KdSettings, score_taught
from fourfold.losses.token import TokenLoss, build_token_loss, router_term, weighted_sum
from fourfold.objectives.interface import Objective
from fourfold.parallel.loss import Outputs
from fourfold.parallel.step import Scorer
from fourfold.parallel.teacher import TeacherStates
from fourfold.parallel.terms import TARGET_COUNT, TARGETS, LossTerms, Term

_TAUGHT = "taught"
"""In `Batch.extras`: [N, teacher's hidden size], the teacher's last hidden states at this rank's trained positions."""


@dataclass
class DistillationObjective:
    """Divergence from the teacher and cross entropy of the labels, over the summed weight of the step's targets.

    loss = sum_t w_t * (alpha * divergence_t + (1 - alpha) * -log p(target_t | before t)) / sum_t w_t

    Attributes:
        labels: the cross entropy alone, whose denominators are the same.
    """

    settings: KdSettings
    labels: TokenLoss = field(default_factory=TokenLoss)
    _teacher: TeacherStates = field(default_factory=TeacherStates)

    def prepare(self, batches: Sequence[Batch], scorer: Scorer) -> list[Batch]:
        """The teacher's hidden states beside each micro-batch, where this rank will see its loss."""
        found = scorer.teacher_states(batches)
        self._teacher = replace(found, hidden=())
        if not found.hidden:
            return list(batches)
        return [
            replace(batch, extras={**batch.extras, _TAUGHT: taught})
            for batch, taught in zip(batches, found.hidden, strict=True)
        ]

    def denominators(self, batches: Sequence[Batch]) -> dict[str, float]:
        """The summed weight and the number of trained positions, and the number of tokens."""
        return self.labels.denominators(batches)

    def loss(self, outputs: Outputs, batch: Batch) -> LossTerms:
        """The terms `kd`, `nll` where labels count, and `router` with experts; both losses unweighted as metrics."""
        scores = score_taught(
            outputs,
            batch.targets,
            batch.extras[_TAUGHT],
            self._teacher,
            self.settings,
            with_correct=self.labels.accuracy,
        )
        weights = batch.weights.reshape(-1).index_select(0, scores.positions)
        divergence, nll = weighted_sum(scores.divergence, weights), weighted_sum(scores.nll, weights)
        by_labels = (1 - self.settings.alpha) * nll
        # one number of a position is differentiated: the gradients of both parts come with the first term
        terms = {"kd": Term(weighted_sum(scores.loss, weights) - by_labels, TARGETS)}
        if self.settings.alpha < 1:
            terms["nll"] = Term(by_labels, TARGETS)
        terms |= router_term(outputs, batch, self.labels.router_coefficient)
        metrics = {"kd_loss": Term(divergence, TARGETS), "ce_loss": Term(nll, TARGETS)}
        if scores.correct is not None:
            metrics["accuracy"] = Term(scores.correct.sum().float(), TARGET_COUNT)
        return LossTerms(terms, metrics)


def build(run: Run) -> Objective:
    """The objective of stage `kd`."""
    keys = run.preference
    settings = KdSettings(keys.kd_loss, keys.kd_beta, keys.kd_temperature, keys.kd_alpha)
    return DistillationObjective(settings, build_token_loss(run))
