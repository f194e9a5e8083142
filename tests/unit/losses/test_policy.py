"""PPO's losses against numbers worked out by hand, GRPO's against TRL's on the same log-probabilities."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fourfold.losses.advantages import without_truncated
from fourfold.losses.policy import (
    Aggregation,
    GroupPolicyLosses,
    GroupPolicySettings,
    KlKind,
    aggregation_denominator,
    group_policy_loss,
    kl_estimate,
    policy_loss,
    sequence_log_ratios,
    token_weights,
    value_loss,
)
from trl_losses import trl_grpo

MAX_LENGTH = 8


def close(found: Tensor, wanted: Tensor | list[float] | float) -> None:
    """Equal within 1e-6."""
    torch.testing.assert_close(found, torch.as_tensor(wanted, dtype=torch.float32), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("kind", "wanted"), [("k1", 0.6931472), ("k2", 0.2402265), ("k3", 0.1931472)])
def test_kl_estimate_when_policy_is_twice_as_sure_has_its_known_value(kind: KlKind, wanted: float) -> None:
    found = kl_estimate(torch.tensor([math.log(0.5), -1.0]), torch.tensor([math.log(0.25), -1.0]), kind)
    close(found, [wanted, 0.0])  # d = ln 2: k3 = 1/2 - 1 + ln 2


def test_kl_estimate_when_averaged_over_the_policy_is_the_kl() -> None:
    logps = torch.randn(7, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    reference = torch.randn(7, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    wanted = (logps.exp() * (logps - reference)).sum()
    for kind in ("k1", "k3"):
        close((logps.exp() * kl_estimate(logps, reference, kind)).sum(), wanted)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_estimate_when_extreme_stays_finite(kind: KlKind) -> None:
    logps = torch.tensor([-1e4, -1e-3]).requires_grad_()
    found = kl_estimate(logps, torch.tensor([-1e-3, -1e4]), kind)
    (grad,) = torch.autograd.grad(found.sum(), logps)
    assert found.isfinite().all()
    assert grad.isfinite().all()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope", "low", "high"),
    [
        (1.5, 1.0, -1.2, 0.0, False, True),  # as far as it may go
        (1.5, -1.0, 1.5, 1.5, False, False),
        (0.5, 1.0, -0.5, -0.5, False, False),
        (0.5, -1.0, 0.8, 0.0, True, False),
        (1.1, 2.0, -2.2, -2.2, False, False),
    ],
)
def test_policy_loss_when_computed_by_hand_equals_it(
    ratio: float, advantage: float, loss: float, slope: float, low: bool, high: bool
) -> None:
    log_ratio = torch.tensor([math.log(ratio)]).requires_grad_()
    found = policy_loss(log_ratio, torch.tensor([advantage]), clip_low=0.2, clip_high=0.2)
    close(found.losses, [loss])
    close(found.ratios, [ratio])
    assert (found.clipped_low.item(), found.clipped_high.item()) == (low, high)
    (grad,) = torch.autograd.grad(found.losses.sum(), log_ratio)
    close(grad, [slope])  # d/d log ratio = ratio * d/d ratio


def test_policy_loss_when_the_upper_bound_is_higher_lets_ratios_rise_further() -> None:
    log_ratios = torch.tensor([1.25, 1.4, 0.75]).log()
    found = policy_loss(log_ratios, torch.tensor([1.0, 1.0, -1.0]), clip_low=0.2, clip_high=0.28)
    close(found.losses, [-1.25, -1.28, 0.8])


def test_policy_loss_when_ratios_are_extreme_stays_finite() -> None:
    log_ratios = torch.tensor([1e3, -1e3, 1e3, -1e3]).requires_grad_()
    found = policy_loss(log_ratios, torch.tensor([1.0, 1.0, -1.0, -1.0]), clip_low=0.2, clip_high=0.2)
    assert found.losses.isfinite().all()
    (grad,) = torch.autograd.grad(found.losses.sum(), log_ratios)
    assert grad.isfinite().all()


def test_value_loss_when_computed_by_hand_equals_it() -> None:
    values = torch.tensor([2.0, 2.0, 1.1]).requires_grad_()
    # (2 - 0)^2 / 2;  clipped to 1.2: (1.2 - 3)^2 / 2 > (2 - 3)^2 / 2;  within the clip: (1.1 - 3)^2 / 2
    found = value_loss(values, torch.ones(3), torch.tensor([0.0, 3.0, 3.0]), 0.2)
    close(found.losses, [2.0, 1.62, 1.805])
    assert found.clipped.tolist() == [False, True, False]
    (grad,) = torch.autograd.grad(found.losses.sum(), values)
    close(grad, [2.0, 0.0, -1.9])


def make_rollouts(lengths: tuple[int, ...] = (5, 8, 1, 3, 6, 2)) -> dict[str, Tensor]:
    """Log-probabilities [B, T] that moved far enough for both bounds to hold some back."""
    generator = torch.Generator().manual_seed(3)
    shape = len(lengths), max(lengths)
    logps = -torch.rand(shape, generator=generator) * 3
    return {
        "logps": logps.clone().requires_grad_(),
        "mask": (torch.arange(shape[1]) < torch.tensor(lengths)[:, None]).long(),
        "advantages": torch.randn(shape[0], generator=generator),
        "old_logps": logps + 0.3 * torch.randn(shape, generator=generator),
        "reference_logps": logps + 0.5 * torch.randn(shape, generator=generator),
    }


def ours(
    rollouts: dict[str, Tensor], aggregation: Aggregation, settings: GroupPolicySettings
) -> tuple[Tensor, GroupPolicyLosses]:
    """The loss of the step, and the losses of its tokens."""
    kept = rollouts["mask"].bool()
    rows, counts = torch.nonzero(kept)[:, 0], kept.sum(-1)
    flat = {name: rollouts[name][kept] for name in ("logps", "old_logps", "reference_logps")}
    found = group_policy_loss(**flat, advantages=rollouts["advantages"], rows=rows, counts=counts, settings=settings)
    total = torch.dot(token_weights(aggregation, rows, counts), found.losses)
    return total / aggregation_denominator(aggregation, len(counts), float(counts.sum()), MAX_LENGTH), found


def theirs(
    rollouts: dict[str, Tensor], aggregation: Aggregation, settings: GroupPolicySettings
) -> tuple[Tensor, dict[str, Any]]:
    """TRL's loss and metrics."""
    return trl_grpo(
        **rollouts,
        loss_type=aggregation,
        importance_sampling_level="sequence" if settings.sequence_level else "token",
        epsilon_low=settings.clip_low,
        epsilon_high=settings.clip_high,
        beta=settings.kl_weight,
        max_completion_length=MAX_LENGTH,
    )


@pytest.mark.parametrize("aggregation", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("sequence_level", [False, True])
@pytest.mark.parametrize("kl_weight", [0.0, 0.04])
def test_group_policy_loss_when_compared_equals_trl(
    aggregation: Aggregation, sequence_level: bool, kl_weight: float
) -> None:
    rollouts = make_rollouts()
    settings = GroupPolicySettings(0.1, 0.15, sequence_level, kl_weight)
    total, found = ours(rollouts, aggregation, settings)
    loss, metrics = theirs(rollouts, aggregation, settings)
    close(total, loss)
    (wanted_grad,), (grad,) = (torch.autograd.grad(x, rollouts["logps"]) for x in (loss, total))
    torch.testing.assert_close(grad, wanted_grad, rtol=1e-5, atol=1e-7)
    assert found.kl is not None
    if kl_weight:
        close(found.kl.mean(), metrics["kl"])
    if not sequence_level:  # whose share TRL takes over rollouts
        close(found.policy.clipped_low.float().mean(), metrics["clip_ratio/low_mean"])
        close(found.policy.clipped_high.float().mean(), metrics["clip_ratio/high_mean"])
        assert min(metrics["clip_ratio/low_mean"], metrics["clip_ratio/high_mean"]) > 0


@pytest.mark.parametrize("aggregation", ["grpo", "dapo", "dr_grpo"])
def test_group_policy_loss_when_a_truncated_completion_is_left_out_equals_trl(aggregation: Aggregation) -> None:
    rollouts = make_rollouts()
    truncated = torch.tensor([False, True, False, False, True, False])
    rollouts["mask"] = without_truncated(rollouts["mask"], truncated).long()
    settings = GroupPolicySettings(kl_weight=0.02)
    total, _ = ours(rollouts, aggregation, settings)
    rollouts_of_trl = {**rollouts, "mask": rollouts["mask"]}
    loss, _ = theirs(rollouts_of_trl, aggregation, settings)
    close(total, loss)


@pytest.mark.parametrize("aggregation", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("sequence_level", [False, True])
def test_group_policy_loss_when_everything_is_masked_is_0(aggregation: Aggregation, sequence_level: bool) -> None:
    rollouts = make_rollouts()
    rollouts["mask"] = torch.zeros_like(rollouts["mask"])
    total, found = ours(rollouts, aggregation, GroupPolicySettings(0.2, 0.2, sequence_level, 0.1))
    assert total.item() == 0.0
    assert found.losses.shape == (0,)


def test_group_policy_loss_when_nothing_moved_is_minus_the_advantage() -> None:
    logps, rows = torch.tensor([-1.0, -2.0, -3.0]).requires_grad_(), torch.tensor([0, 0, 1])
    found = group_policy_loss(
        logps, logps, torch.tensor([2.0, -1.0]), rows, torch.tensor([2, 1]), GroupPolicySettings()
    )
    assert found.losses.tolist() == [-2.0, -2.0, 1.0]
    assert found.kl is None
    (grad,) = torch.autograd.grad(found.losses.sum(), logps)
    assert grad.tolist() == [-2.0, -2.0, 1.0]


def test_sequence_log_ratios_when_averaged_are_the_same_within_a_rollout() -> None:
    found = sequence_log_ratios(torch.tensor([0.2, 0.4, -1.0]), torch.tensor([0, 0, 2]), torch.tensor([2, 0, 1]))
    close(found, [0.3, 0.3, -1.0])


def test_token_weights_when_aggregated_give_rollouts_or_tokens_the_same_say() -> None:
    rows, counts = torch.tensor([0, 0, 0, 2]), torch.tensor([3, 0, 1])
    close(token_weights("grpo", rows, counts), [1 / 3, 1 / 3, 1 / 3, 1.0])
    for aggregation in ("dapo", "dr_grpo"):
        assert token_weights(aggregation, rows, counts).tolist() == [1.0] * 4
    denominators = [aggregation_denominator(kind, 3, 4, 10) for kind in ("grpo", "dapo", "dr_grpo")]
    assert denominators == [3.0, 4.0, 30.0]
    assert aggregation_denominator("dapo", 3, 0, 10) == 1.0
