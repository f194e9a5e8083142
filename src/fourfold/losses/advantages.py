"""From rewards to advantages: what PPO and GRPO compute of a buffer of rollouts before they learn from it.

Nothing here has a gradient. Statistics over all rollouts of a step come as sums that ranks add up (`moment_sums`), so
every rank scales alike and no number depends on how the rollouts were divided.

Legend: B rollouts, T positions, G groups of rollouts of one prompt, F reward functions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Scaling: TypeAlias = Literal["group", "batch", "none"]
"""What group-relative advantages are divided by: the standard deviation in the group, in the batch, or nothing."""

_WHITEN_EPSILON = 1e-8
"""Added to the variance (TRL 0.9)."""
_GROUP_EPSILON = 1e-4
"""Added to the standard deviation of rewards (TRL 1.16)."""
_NO_SPREAD = 1e-8
"""Rewards whose standard deviation is no greater are the same."""
_LARGEST_KL_ERROR = 0.2
"""The adaptive controller sees the KL as no further from its target than this share (arXiv 1909.08593, section 2.2)."""


def moment_sums(values: Tensor, mask: Tensor) -> Tensor:
    """Sum, sum of squares and count of the values under the mask; those of all ranks are to be added up.

    Args:
        values: any shape.
        mask: bool or 0 and 1, the shape of values.
    Returns:
        [3] fp64, so that the variance survives the difference of two large sums.
    """
    kept = mask.bool()
    known = torch.where(kept, values.detach(), 0).double()
    return torch.stack([known.sum(), known.square().sum(), kept.sum().double()])


def mean_and_variance(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Mean, and variance with n - 1, of [3] moment_sums; scalars fp64. 0 where there is too little to tell."""
    total, square_total, count = sums.double().unbind()
    mean = total / count.clamp(min=1)
    return mean, ((square_total - total * mean) / (count - 1).clamp(min=1)).clamp(min=0)


def whiten(values: Tensor, mask: Tensor, sums: Tensor | None = None, *, shift_mean: bool = True) -> Tensor:
    """Values scaled to a variance of 1, and with `shift_mean` to a mean of 0.

    Args:
        values: any shape.
        mask: bool or 0 and 1, the shape of values.
        sums: moment_sums of all ranks; None for those of the given values.
        shift_mean: False leaves the mean where it was, as PPO does with rewards (key `ppo_whiten_rewards`).
    Returns:
        fp32, the shape of values; 0 outside the mask.
    """
    mean, variance = mean_and_variance(moment_sums(values, mask) if sums is None else sums)
    whitened = (values.detach().double() - mean) * torch.rsqrt(variance + _WHITEN_EPSILON)
    return torch.where(mask.bool(), whitened if shift_mean else whitened + mean, 0).float()


@dataclass(frozen=True, slots=True)
class RunningMoments:
    """Mean and standard deviation of all scores so far, for `ppo_score_norm`; small enough to go into a checkpoint.

    Attributes:
        total: sum.
        square_total: sum of squares.
        count: how many numbers they are of.
    """

    total: float = 0.0
    square_total: float = 0.0
    count: float = 0.0

    def updated(self, sums: Tensor) -> RunningMoments:
        """With [3] moment_sums of more scores."""
        total, square_total, count = sums.tolist()
        return RunningMoments(self.total + total, self.square_total + square_total, self.count + count)

    def normalised(self, scores: Tensor) -> Tensor:
        """Scores [B] less the mean, over the standard deviation -> [B] fp32; 0 for the only score so far."""
        sums = torch.tensor([self.total, self.square_total, self.count], dtype=torch.float64, device=scores.device)
        mean, variance = mean_and_variance(sums)
        return ((scores.detach().double() - mean) / (variance.sqrt() + torch.finfo(torch.float32).eps)).float()


@dataclass(frozen=True, slots=True)
class KlController:
    """The weight of the KL penalty in PPO's rewards: fixed, or steered towards a target.

    Attributes:
        value: the weight now.
        target: key `ppo_target`, nats per rollout; None for a fixed weight.
        horizon: number of rollouts over which an error of the KL is made up for.
    """

    value: float = 0.2
    target: float | None = None
    horizon: float = 10000.0

    def updated(self, kl: float, num_rollouts: int) -> KlController:
        """After a step: value * (1 + clip(kl / target - 1, -0.2, 0.2) * num_rollouts / horizon).

        Args:
            kl: mean over the step's rollouts of their summed log pi - log pi_ref.
            num_rollouts: of the step, all ranks.
        Source:
            arXiv 1909.08593, section 2.2.
        """
        if self.target is None:
            return self
        error = min(max(kl / self.target - 1, -_LARGEST_KL_ERROR), _LARGEST_KL_ERROR)
        return KlController(self.value * (1 + error * num_rollouts / self.horizon), self.target, self.horizon)


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_weight: float) -> Tensor:
    """PPO's rewards: at every token the KL penalty, at the last one of a rollout its score besides.

    Args:
        scores: [B].
        kl: [B, T] estimates, see `policy.kl_estimate`.
        mask: [B, T] bool or 0 and 1, the tokens that the policy chose.
        kl_weight: value of the KlController.
    Returns:
        [B, T] fp32; 0 outside the mask. The score of a rollout without tokens is nowhere.
    """
    kept = mask.bool()
    positions = torch.arange(kept.shape[1], device=kept.device)
    last = kept & (positions == torch.where(kept, positions, -1).amax(1, keepdim=True))
    rewards = -kl_weight * kl.detach().float() + torch.where(last, scores.detach().float()[:, None], 0)
    return torch.where(kept, rewards, 0)


@dataclass(frozen=True, slots=True)
class Advantages:
    """What generalised advantage estimation finds.

    Attributes:
        advantages: [B, T] fp32, not whitened; 0 outside the mask.
        returns: [B, T] fp32, advantages plus values: what the value head is to learn; 0 outside the mask.
    """

    advantages: Tensor
    returns: Tensor


def estimate_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, *, discount: float = 1.0, trace: float = 0.95
) -> Advantages:
    """Generalised advantage estimation (GAE).

    delta_t = r_t + discount * V_t' - V_t,  A_t = delta_t + discount * trace * A_t'  with t' the next position under the
    mask; both are 0 after a rollout's last. Positions outside the mask (prompts, padding, what a tool answered) are
    passed over and take no part.

    Args:
        rewards: [B, T].
        values: [B, T] of the value head, when the rollout was made.
        mask: [B, T] bool or 0 and 1.
        discount: gamma, in [0, 1].
        trace: lambda, in [0, 1].
    Source:
        arXiv 1506.02438; the defaults are TRL 0.9's, which LLaMA-Factory uses.
    """
    kept = mask.bool()
    rewards, values = rewards.detach().float(), values.detach().float()
    next_value = next_advantage = rewards.new_zeros(len(rewards))
    columns: list[Tensor] = []
    for position in range(rewards.shape[1] - 1, -1, -1):
        here, value = kept[:, position], values[:, position]
        advantage = rewards[:, position] + discount * next_value - value + discount * trace * next_advantage
        next_value, next_advantage = torch.where(here, value, next_value), torch.where(here, advantage, next_advantage)
        columns.append(advantage)
    advantages = torch.stack(columns[::-1], 1) if columns else torch.zeros_like(rewards)
    return Advantages(torch.where(kept, advantages, 0), torch.where(kept, advantages + values, 0))


def total_rewards(rewards: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of what several reward functions say.

    Args:
        rewards: [B, F]; NaN where a function says nothing of a rollout.
        weights: [F].
    Returns:
        [B] fp32; NaN where none says anything.
    """
    silent = rewards.isnan()
    totals = torch.where(silent, 0, rewards.float() * weights.float()).sum(1)
    return torch.where(silent.all(1), torch.nan, totals)


@dataclass(frozen=True, slots=True)
class GroupAdvantages:
    """Advantages over the other rollouts of the same prompt.

    Attributes:
        advantages: [B] fp32.
        no_spread: [G] bool, whether the group's rewards are all the same, so that nothing is learnt from it.
    """

    advantages: Tensor
    no_spread: Tensor


def group_advantages(rewards: Tensor, groups: Tensor, num_groups: int, scaling: Scaling = "group") -> GroupAdvantages:
    """GRPO's advantages: (r - mean of the group) / (standard deviation + 1e-4).

    Args:
        rewards: [B] of all rollouts of the step; NaN for one without a reward, which counts for nothing and gets 0.
        groups: [B] int64, index of each rollout's prompt.
        num_groups: G.
        scaling: "group" for GRPO, "none" for Dr. GRPO.
    Source:
        arXiv 2402.03300 (GRPO), arXiv 2503.20783 (Dr. GRPO); deviations with n - 1 and the 1e-4 are TRL 1.16's.
    """
    known = ~rewards.isnan()
    present = torch.where(known, rewards.detach(), 0).double()

    def sum_groups(numbers: Tensor) -> Tensor:
        return numbers.new_zeros(num_groups).index_add(0, groups, numbers)

    counts = sum_groups(known.double())
    means = sum_groups(present) / counts.clamp(min=1)
    centred = torch.where(known, present - means.index_select(0, groups), 0)
    deviations = (sum_groups(centred.square()) / (counts - 1).clamp(min=1)).sqrt()
    if scaling == "group":
        advantages = centred / (deviations.index_select(0, groups) + _GROUP_EPSILON)
    elif scaling == "batch":
        advantages = centred / (mean_and_variance(moment_sums(present, known))[1].sqrt() + _GROUP_EPSILON)
    else:
        advantages = centred
    return GroupAdvantages(advantages.float(), deviations <= _NO_SPREAD)


def overlong_penalty(lengths: Tensor, max_length: int, buffer: int) -> Tensor:
    """DAPO's reward for length: 0 up to max_length - buffer, falling to -1 at max_length, -1 beyond.

    Args:
        lengths: [B] tokens of each completion.
        max_length: tokens.
        buffer: tokens before max_length over which the reward falls, at least 1.
    Returns:
        [B] fp32, in [-1, 0].
    Source:
        arXiv 2503.14476, equation 13.
    """
    return ((max_length - buffer - lengths.float()) / buffer).clamp(-1, 0)


def without_truncated(mask: Tensor, truncated: Tensor) -> Tensor:
    """Mask that leaves out completions that were cut off before they ended, so that nothing is learnt from them.

    They still count among the rollouts where a loss is a mean over rollouts, as in TRL 1.16.

    Args:
        mask: [B, T] bool or 0 and 1.
        truncated: [B] bool.
    Returns:
        [B, T] bool.
    """
    return mask.bool() & ~truncated[:, None]
