"""PPO: a policy and its value head learn from rollouts whose tokens were judged one by one.

The rollouts come with the samples (training/practice.py): for each token that the policy chose its advantage, the
return that the value head is to learn, and what policy and head said when the rollouts were made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fourfold.config.schema import Run
from fourfold.dataset.batch import Batch
from fourfold.generate.interface import policy_temperature
from fourfold.losses.policy import kl_estimate, policy_loss, value_loss
from fourfold.losses.token import router_term
from fourfold.objectives.interface import Objective
from fourfold.parallel.loss import Outputs, at_temperature, score_tokens
from fourfold.parallel.step import Scorer
from fourfold.parallel.terms import TARGET_COUNT, TOKENS, LossTerms, Term

ADVANTAGES, OLD_LOGPS, OLD_VALUES, RETURNS = "advantages", "old_logps", "old_values", "returns"
"""Numbers of targets (`Batch.numbers`)."""
VALUE_WEIGHT, CLIP, VALUE_CLIP = 0.1, 0.2, 0.2
"""TRL 0.9's, which LLaMA-Factory uses."""


@dataclass(frozen=True, slots=True)
class PolicyValueObjective:
    """The clipped losses of policy and value head, means over the tokens that the policy chose.

    Attributes:
        temperature: that the rollouts were sampled at; the policy is the model's at this temperature.
        router_coefficient: weight of the experts' load-balancing loss.
    """

    clip: float = CLIP
    value_clip: float = VALUE_CLIP
    value_weight: float = VALUE_WEIGHT
    temperature: float = 1.0
    router_coefficient: float = 0.0

    def prepare(self, batches: Sequence[Batch], scorer: Scorer) -> list[Batch]:
        """Everything is with the samples."""
        return list(batches)

    def denominators(self, batches: Sequence[Batch]) -> dict[str, float]:
        """The numbers of chosen tokens, and of all tokens."""
        return {
            TARGET_COUNT: float(sum(batch.num_targets for batch in batches)),
            TOKENS: float(sum(batch.num_tokens for batch in batches)),
        }

    def loss(self, outputs: Outputs, batch: Batch) -> LossTerms:
        """The terms `policy`, `value` and, with experts, `router`; clipping, the KL and the entropy as metrics."""
        scores = score_tokens(at_temperature(outputs, self.temperature), batch.targets)
        logps, positions = -scores.nll, scores.positions
        values = outputs.values_at(positions)
        advantages, old, old_values, returns = (
            batch.numbers[name].reshape(-1).index_select(0, positions) if name in batch.numbers else logps.detach() * 0
            for name in (ADVANTAGES, OLD_LOGPS, OLD_VALUES, RETURNS)
        )
        policy = policy_loss(logps - old, advantages, clip_low=self.clip, clip_high=self.clip)
        value = value_loss(values, old_values, returns, self.value_clip)
        terms = {
            "policy": Term(policy.losses.sum(), TARGET_COUNT),
            "value": Term(self.value_weight * value.losses.sum(), TARGET_COUNT),
        }
        metrics = {
            "clip_fraction": (policy.clipped_low | policy.clipped_high).float(),
            "value_clip_fraction": value.clipped.float(),
            "approx_kl": kl_estimate(logps.detach(), old),
            "entropy": -logps.detach(),
            "values": values.detach(),
        }
        return LossTerms(
            terms | router_term(outputs, batch, self.router_coefficient),
            {name: Term(each.sum(), TARGET_COUNT) for name, each in metrics.items()},
        )


def build(run: Run) -> Objective:
    """The objective of stage `ppo`."""
    return PolicyValueObjective(
        temperature=policy_temperature(run),
        router_coefficient=run.model.moe_aux_loss_coef or 0.0,
    )
