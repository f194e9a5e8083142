"""Losses of PPO and GRPO, one number for each token that the policy chose.

Advantages and returns come from `advantages`; how tokens weigh in the step's loss is `token_weights`: the loss is
sum(weight * loss) over all tokens of the step, divided by `aggregation_denominator`.

Legend: N tokens of all rollouts laid end to end, R rollouts. Functions without R take tensors of any one shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

KlKind: TypeAlias = Literal["k1", "k2", "k3"]
"""Estimators of the KL from samples."""

Aggregation: TypeAlias = Literal["grpo", "dapo", "dr_grpo"]
"""How tokens' losses make one: a mean of rollouts' means, a mean over tokens, or sums over a constant length."""

_LARGEST_LOG_RATIO = 20.0
"""Log-ratios are held within plus and minus this before exp(), which keeps losses finite; beyond it, no gradient."""


def kl_estimate(logps: Tensor, reference_logps: Tensor, kind: KlKind = "k3") -> Tensor:
    """Estimate of KL(pi, pi_ref) at each token, from the token that pi chose.

    With d = log pi - log pi_ref:  k1 = d (unbiased), k2 = d^2 / 2,  k3 = exp(-d) - 1 + d (unbiased, never below 0).

    Args:
        logps: of the policy.
        reference_logps: of the reference, the same shape; gets no gradient.
    Returns:
        fp32, the same shape.
    """
    difference = logps.float() - reference_logps.detach().float()
    if kind == "k1":
        return difference
    if kind == "k2":
        return difference.square() / 2
    held = difference.clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)
    return torch.exp(-held) - 1 + held


@dataclass(frozen=True, slots=True)
class PolicyLosses:
    """One number for each token.

    Attributes:
        losses: fp32.
        ratios: fp32, pi / pi_old; detached.
        clipped_low: bool, whether the loss is flat because the ratio is too small already.
        clipped_high: bool, the same for too large.
    """

    losses: Tensor
    ratios: Tensor
    clipped_low: Tensor
    clipped_high: Tensor


def policy_loss(log_ratios: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float) -> PolicyLosses:
    """PPO's clipped loss, also that of GRPO:  -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A).

    Args:
        log_ratios: log pi - log pi_old; those of `sequence_log_ratios` for GSPO.
        advantages: the same shape; gets no gradient.
        clip_low: at least 0; PPO has the same number for both.
        clip_high: at least 0; larger than clip_low for DAPO's clip-higher.
    Source:
        arXiv 1707.06347, equation 7; arXiv 2503.14476 for two bounds.
    """
    advantages = advantages.detach().float()
    ratios = log_ratios.float().clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO).exp()
    losses = -torch.minimum(ratios * advantages, ratios.clamp(1 - clip_low, 1 + clip_high) * advantages)
    found = ratios.detach()
    return PolicyLosses(
        losses, found, (found < 1 - clip_low) & (advantages < 0), (found > 1 + clip_high) & (advantages > 0)
    )


@dataclass(frozen=True, slots=True)
class ValueLosses:
    """One number for each token.

    Attributes:
        losses: fp32.
        clipped: bool, whether the loss is that of the clipped value.
    """

    losses: Tensor
    clipped: Tensor


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> ValueLosses:
    """PPO's loss of the value head:  max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2) / 2.

    Args:
        values: of the value head now.
        old_values: when the rollouts were made; the same shape.
        returns: the same shape.
        clip: at least 0.
    Source:
        TRL 0.9's PPOTrainer, which LLaMA-Factory uses; it adds this to the policy's loss times 0.1.
    """
    values, old_values, returns = values.float(), old_values.detach().float(), returns.detach().float()
    plain = (values - returns).square()
    held = (values.clamp(old_values - clip, old_values + clip) - returns).square()
    return ValueLosses(torch.maximum(plain, held) / 2, held.detach() > plain.detach())


def sequence_log_ratios(log_ratios: Tensor, rows: Tensor, counts: Tensor) -> Tensor:
    """GSPO's log-ratios: the mean over a rollout's tokens, at each of them.

    Args:
        log_ratios: [N] log pi - log pi_old.
        rows: [N] int64, rollout of each token.
        counts: [R] tokens of each rollout.
    Returns:
        [N] fp32.
    Source:
        arXiv 2507.18071, equation 7.
    """
    sums = log_ratios.float().new_zeros(len(counts)).index_add(0, rows, log_ratios.float())
    return (sums / counts.clamp(min=1)).index_select(0, rows)


@dataclass(frozen=True, slots=True)
class GroupPolicySettings:
    """Numbers of GRPO's loss.

    Attributes:
        clip_low: at least 0.
        clip_high: at least 0.
        sequence_level: one ratio for each rollout instead of each token (GSPO).
        kl_weight: weight of the KL from the reference, at least 0.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    sequence_level: bool = False
    kl_weight: float = 0.0


@dataclass(frozen=True, slots=True)
class GroupPolicyLosses:
    """One number for each of N tokens.

    Attributes:
        losses: [N] fp32, with the KL term.
        policy: loss without the KL term, ratios, and what was clipped.
        kl: [N] fp32, k3 estimate, detached; None without a reference.
    """

    losses: Tensor
    policy: PolicyLosses
    kl: Tensor | None


def group_policy_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    rows: Tensor,
    counts: Tensor,
    settings: GroupPolicySettings,
    reference_logps: Tensor | None = None,
) -> GroupPolicyLosses:
    """The loss of GRPO and its variants at each token.

    Args:
        logps: [N] of the policy.
        old_logps: [N] of the policy that made the rollouts; gets no gradient. `logps.detach()` for the first step.
        advantages: [R] of each rollout, see `advantages.group_advantages`.
        rows: [N] int64, rollout of each token.
        counts: [R] tokens of each rollout.
        reference_logps: [N] of the reference; needed with a kl_weight, else only for the metric.
    Source:
        arXiv 2402.03300, equation 3.
    """
    log_ratios = logps.float() - old_logps.detach().float()
    if settings.sequence_level:
        log_ratios = sequence_log_ratios(log_ratios, rows, counts)
    policy = policy_loss(
        log_ratios, advantages.index_select(0, rows), clip_low=settings.clip_low, clip_high=settings.clip_high
    )
    if reference_logps is None:
        assert not settings.kl_weight, "a kl_weight needs log-probabilities of a reference"
        return GroupPolicyLosses(policy.losses, policy, None)
    kl = kl_estimate(logps, reference_logps)
    losses = policy.losses + settings.kl_weight * kl if settings.kl_weight else policy.losses
    return GroupPolicyLosses(losses, policy, kl.detach())


def token_weights(aggregation: Aggregation, rows: Tensor, counts: Tensor) -> Tensor:
    """Weight of each token, to go with `aggregation_denominator`.

    Args:
        rows: [N] int64, rollout of each token; tokens of truncated rollouts may be left out.
        counts: [R] tokens of each rollout.
    Returns:
        [N] fp32.
    """
    if aggregation == "grpo":
        return (1.0 / counts.clamp(min=1).float()).index_select(0, rows)
    return torch.ones(len(rows), device=rows.device)


def aggregation_denominator(aggregation: Aggregation, num_rows: float, num_tokens: float, max_length: int) -> float:
    """What the weighted sum over the step's tokens is divided by; at least 1.

    Args:
        num_rows: rollouts of the step, all ranks, truncated ones too.
        num_tokens: their trained tokens.
        max_length: largest number of tokens of a completion that generation allows.
    Source:
        arXiv 2402.03300 (grpo), 2503.14476 (dapo), 2503.20783 (dr_grpo).
    """
    denominators = {"grpo": num_rows, "dapo": num_tokens, "dr_grpo": num_rows * max_length}
    return max(float(denominators[aggregation]), 1.0)
