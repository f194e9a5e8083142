"""GRPO and its variants: learning from groups of answers to the same prompt, each better or worse than its group.

The rollouts come with the samples (training/rollouts.py): an advantage, a weight and, where they are needed, the
log-probabilities of before, for each token that the policy chose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fourfold.config.schema import Run
from fourfold.dataset.batch import Batch
from fourfold.generate.interface import policy_temperature
from fourfold.losses.documents import count_targets
from fourfold.losses.policy import kl_estimate, policy_loss
from fourfold.losses.token import router_term
from fourfold.objectives.interface import Objective
from fourfold.parallel.loss import Outputs, at_temperature, score_tokens
from fourfold.parallel.step import Scorer
from fourfold.parallel.terms import TARGET_COUNT, TOKENS, LossTerms, Term

ADVANTAGES, OLD_LOGPS, REFERENCE_LOGPS = "advantages", "old_logps", "reference_logps"
"""Numbers of targets (`Batch.numbers`); without OLD_LOGPS the policy is the one that made the rollouts."""
ROLLOUTS = "rollouts"
"""Number of a sample: 1 for a rollout that counts in the denominators."""
_COUNTS = "counts"
_POLICY = "policy"


@dataclass(frozen=True, slots=True)
class GroupPolicyObjective:
    """The clipped policy loss of the step's rollouts, and the KL from the reference.

    Attributes:
        clip_low, clip_high: how far a ratio may move.
        sequence_level: one ratio for each rollout (GSPO).
        kl_weight: weight of the KL from the reference.
        per_rollout: how much each rollout adds to the denominator: 1 for a mean over rollouts (grpo), the longest
            answer for dr_grpo; None to divide by the trained tokens (dapo).
        temperature: that the rollouts were sampled at; the policy is the model's at this temperature.
        router_coefficient: weight of the experts' load-balancing loss.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    sequence_level: bool = False
    kl_weight: float = 0.0
    per_rollout: float | None = 1.0
    temperature: float = 1.0
    router_coefficient: float = 0.0

    def prepare(self, batches: Sequence[Batch], scorer: Scorer) -> list[Batch]:
        """The number of tokens of each rollout."""
        return [replace(batch, extras={**batch.extras, _COUNTS: count_targets(batch)}) for batch in batches]

    def denominators(self, batches: Sequence[Batch]) -> dict[str, float]:
        """What the policy's loss is divided by, and the numbers of chosen tokens and of all tokens."""
        chosen = float(sum(int((batch.weights > 0).sum()) for batch in batches))
        rollouts = sum(float(batch.extras[ROLLOUTS].sum()) for batch in batches if ROLLOUTS in batch.extras)
        return {
            _POLICY: chosen if self.per_rollout is None else rollouts * self.per_rollout,
            TARGET_COUNT: chosen,
            TOKENS: float(sum(batch.num_tokens for batch in batches)),
        }

    def loss(self, outputs: Outputs, batch: Batch) -> LossTerms:
        """The terms `policy` and, if asked for, `kl` and `router`; clipping, the KL and the entropy as metrics."""
        scores = score_tokens(at_temperature(outputs, self.temperature), batch.targets)
        logps = -scores.nll

        def numbers(name: str) -> Tensor | None:
            values = batch.numbers.get(name)
            return None if values is None else values.reshape(-1).index_select(0, scores.positions)

        weights = batch.weights.reshape(-1).index_select(0, scores.positions)
        advantages, old, reference = numbers(ADVANTAGES), numbers(OLD_LOGPS), numbers(REFERENCE_LOGPS)
        if advantages is None:  # only fills up
            advantages = torch.zeros_like(logps)
        log_ratios = logps - (logps.detach() if old is None else old)
        if self.sequence_level:
            log_ratios = self._of_sequences(log_ratios, outputs, batch, scores.positions)
        policy = policy_loss(log_ratios, advantages, clip_low=self.clip_low, clip_high=self.clip_high)
        terms = {"policy": Term((weights * policy.losses).sum(), _POLICY)}
        counted = (weights > 0).float()
        metrics = {
            "clip_fraction": Term((counted * (policy.clipped_low | policy.clipped_high)).sum(), TARGET_COUNT),
            "entropy": Term((counted * -logps.detach()).sum(), TARGET_COUNT),
        }
        if self.kl_weight:  # also of what only fills up, so that all ranks tell of the same
            kl = kl_estimate(logps, logps.detach() if reference is None else reference)
            terms["kl_penalty"] = Term(self.kl_weight * (weights * kl).sum(), _POLICY)
            metrics["kl"] = Term((counted * kl.detach()).sum(), TARGET_COUNT)
        return LossTerms(terms | router_term(outputs, batch, self.router_coefficient), metrics)

    def _of_sequences(self, log_ratios: Tensor, outputs: Outputs, batch: Batch, positions: Tensor) -> Tensor:
        """[N] -> [N]: the mean over each rollout's tokens, which other ranks may have a part of."""
        sums = outputs.sum_by_document(log_ratios, positions, batch)
        counts = batch.extras[_COUNTS]
        means = sums[: len(counts)] / counts.clamp(min=1)
        return means.index_select(0, batch.document_ids.reshape(-1).index_select(0, positions).long())


def build(run: Run) -> Objective:
    """The objective of stage `grpo`."""
    keys = run.reinforcement
    variant = keys.grpo_variant
    longest = float(run.generation.max_new_tokens)
    per_rollout = {"grpo": 1.0, "gspo": 1.0, "dr_grpo": longest, "dapo": None}[variant]
    return GroupPolicyObjective(
        clip_low=keys.clip_low,
        clip_high=keys.clip_low if keys.clip_high is None else keys.clip_high,
        sequence_level=variant == "gspo",
        kl_weight=keys.kl_weight,
        per_rollout=per_rollout,
        temperature=policy_temperature(run),
        router_coefficient=run.model.moe_aux_loss_coef or 0.0,
    )
