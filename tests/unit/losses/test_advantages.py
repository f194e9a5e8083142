"""Advantages: numbers worked out by hand, and equal to TRL's where TRL has them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fourfold.losses.advantages import (
    KlController,
    RunningMoments,
    Scaling,
    estimate_advantages,
    group_advantages,
    mean_and_variance,
    moment_sums,
    overlong_penalty,
    token_rewards,
    total_rewards,
    whiten,
    without_truncated,
)
from trl_losses import trl_group_advantages, trl_overlong

NAN = math.nan


def close(found: Tensor, wanted: Tensor | list[float] | list[list[float]] | float) -> None:
    """Equal within 1e-6."""
    torch.testing.assert_close(found, torch.as_tensor(wanted, dtype=torch.float32), rtol=1e-6, atol=1e-6)


def test_estimate_advantages_when_computed_by_hand_equals_it() -> None:
    # discount 0.9, trace 0.5: A_2 = 2 + 1 = 3;  A_1 = 0.9 * -1 - 1 + 0.45 * 3 = -0.55;
    # A_0 = 1 + 0.9 * 1 - 0.5 + 0.45 * -0.55 = 1.1525
    rewards, values = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[0.5, 1.0, -1.0]])
    found = estimate_advantages(rewards, values, torch.ones(1, 3), discount=0.9, trace=0.5)
    close(found.advantages, [[1.1525, -0.55, 3.0]])
    close(found.returns, [[1.6525, 0.45, 2.0]])


def test_estimate_advantages_when_positions_are_masked_passes_over_them() -> None:
    # Kept are r = 1, 2 and V = 0.5, -1: A = 2 + 1 = 3 at the last; 1 + 0.9 * -1 - 0.5 + 0.45 * 3 = 0.95 before it.
    rewards = torch.tensor([[7.0, 1.0, NAN, 2.0, 7.0], [0.0] * 5])
    values = torch.tensor([[7.0, 0.5, NAN, -1.0, 7.0], [1.0] * 5])
    mask = torch.tensor([[0, 1, 0, 1, 0], [0] * 5])
    found = estimate_advantages(rewards, values, mask, discount=0.9, trace=0.5)
    close(found.advantages, [[0, 0.95, 0, 3, 0], [0.0] * 5])
    close(found.returns, [[0, 1.45, 0, 2, 0], [0.0] * 5])


def test_estimate_advantages_when_trace_is_0_or_1_is_one_step_or_the_whole_return() -> None:
    rewards, values = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[0.5, 1.0, -1.0]])
    one_step = estimate_advantages(rewards, values, torch.ones(1, 3), trace=0.0)
    close(one_step.advantages, [[1.5, -2.0, 3.0]])
    whole = estimate_advantages(rewards, values, torch.ones(1, 3), trace=1.0)
    close(whole.returns, [[3.0, 2.0, 2.0]])


def test_estimate_advantages_when_there_are_no_positions_is_empty() -> None:
    empty = torch.zeros(2, 0)
    assert estimate_advantages(empty, empty, empty).advantages.shape == (2, 0)


def test_token_rewards_when_computed_by_hand_put_the_score_on_the_last_token() -> None:
    kl = torch.tensor([[9.0, 1.0, 2.0, NAN], [0.5, 9.0, 9.0, 9.0], [9.0, 9.0, 9.0, 9.0]])
    mask = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    found = token_rewards(torch.tensor([5.0, -1.0, 3.0]), kl, mask, 0.1)
    close(found, [[0, -0.1, 4.8, 0], [-1.05, 0, 0, 0], [0, 0, 0, 0]])


def test_whiten_when_computed_by_hand_has_mean_0_and_variance_1() -> None:
    values = torch.tensor([[10.0, 20.0, 30.0, NAN], [40.0, 50.0, 7.0, 7.0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    # mean 30, variance (400 + 100 + 0 + 100 + 400) / 4 = 250
    step = 10 / math.sqrt(250)
    close(whiten(values, mask), [[-2 * step, -step, 0, 0], [step, 2 * step, 0, 0]])
    shifted = whiten(values, mask, shift_mean=False)
    close(shifted, [[30 - 2 * step, 30 - step, 30, 0], [30 + step, 30 + 2 * step, 0, 0]])


def test_whiten_when_ranks_add_up_their_sums_equals_one_process() -> None:
    values = 3 + torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(6, 5, generator=torch.Generator().manual_seed(1)) < 0.6
    sums = moment_sums(values[:2], mask[:2]) + moment_sums(values[2:], mask[2:])
    parts = [whiten(values[rows], mask[rows], sums) for rows in (slice(0, 2), slice(2, 6))]
    assert torch.equal(torch.cat(parts), whiten(values, mask))
    kept = values[mask]
    close(whiten(values, mask)[mask], (kept - kept.mean()) / (kept.var() + 1e-8).sqrt())


def test_whiten_when_values_are_far_from_0_keeps_their_spread() -> None:
    values = 1e4 + torch.tensor([[-0.5, 0.0, 0.5]])
    close(whiten(values, torch.ones(1, 3)), [[-1.0, 0.0, 1.0]])


@pytest.mark.parametrize("mask", [torch.zeros(1, 3), torch.tensor([[0, 1, 0]]), torch.ones(1, 3)])
def test_whiten_when_nothing_varies_is_0(mask: Tensor) -> None:
    assert torch.equal(whiten(torch.full((1, 3), 0.1), mask), torch.zeros(1, 3))


def test_mean_and_variance_when_empty_are_0() -> None:
    mean, variance = mean_and_variance(torch.zeros(3))
    assert (mean.item(), variance.item()) == (0.0, 0.0)


def test_running_moments_when_updated_normalise_by_all_scores() -> None:
    scores = torch.tensor([1.0, 2.0]), torch.tensor([4.0])
    moments = RunningMoments()
    for some in scores:
        moments = moments.updated(moment_sums(some, torch.ones_like(some)))
    # mean 7/3, variance (16 + 1 + 25) / 9 / 2 = 7/3
    close(moments.normalised(scores[1]), [(5 / 3) / math.sqrt(7 / 3)])
    assert moments.count == 3


def test_running_moments_when_one_score_was_seen_give_0() -> None:
    score = torch.tensor([3.0])
    assert RunningMoments().updated(moment_sums(score, torch.ones(1))).normalised(score).item() == 0.0


@pytest.mark.parametrize(
    ("kl", "wanted"),
    [
        (12.0, 0.2 * (1 + 0.2 * 256 / 10000)),  # twice the target, held at 0.2
        (6.6, 0.2 * (1 + 0.1 * 256 / 10000)),
        (6.0, 0.2),
        (-3.0, 0.2 * (1 - 0.2 * 256 / 10000)),
    ],
)
def test_kl_controller_when_adaptive_follows_its_formula(kl: float, wanted: float) -> None:
    assert KlController(0.2, target=6.0).updated(kl, 256).value == pytest.approx(wanted, rel=1e-12)


def test_kl_controller_when_fixed_does_not_move() -> None:
    assert KlController(0.05).updated(100.0, 256) == KlController(0.05)


@pytest.mark.parametrize("scaling", ["group", "batch", "none"])
@pytest.mark.parametrize("with_gaps", [False, True])
def test_group_advantages_when_compared_equal_trl(scaling: Scaling, with_gaps: bool) -> None:
    rewards = torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
    rewards[4:8] = 0.3
    if with_gaps:
        rewards[1, 0] = NAN
        rewards[2] = NAN
    weights = torch.tensor([1.0, 0.5])
    wanted, flat_share = trl_group_advantages(rewards, weights, 4, scaling)
    found = group_advantages(total_rewards(rewards, weights), torch.arange(3).repeat_interleave(4), 3, scaling)
    close(found.advantages, wanted)
    assert found.no_spread.tolist() == [False, True, False]
    if scaling != "batch":
        assert flat_share == pytest.approx(1 / 3)
    assert found.advantages[4:8].tolist() == [0.0] * 4


def test_group_advantages_when_computed_by_hand_equal_it() -> None:
    rewards = torch.tensor([1.0, 5.0, 0.0, 0.0, 5.0, 1.0])
    groups = torch.tensor([0, 1, 0, 0, 1, 0])
    # group 0 has mean 1/2 and deviation sqrt(4 * 1/4 / 3) = 1 / sqrt(3)
    scaled = 0.5 / (1 / math.sqrt(3) + 1e-4)
    found = group_advantages(rewards, groups, 2)
    close(found.advantages, [scaled, 0, -scaled, -scaled, 0, scaled])
    assert found.no_spread.tolist() == [False, True]
    close(group_advantages(rewards, groups, 2, "none").advantages, [0.5, 0, -0.5, -0.5, 0, 0.5])


def test_group_advantages_when_a_group_has_one_rollout_or_none_are_0() -> None:
    found = group_advantages(torch.tensor([3.0, NAN, NAN]), torch.tensor([0, 1, 1]), 3)
    assert found.advantages.tolist() == [0.0, 0.0, 0.0]
    assert found.no_spread.tolist() == [True, True, True]


def test_total_rewards_when_functions_are_silent_leave_them_out() -> None:
    rewards = torch.tensor([[1.0, 2.0], [NAN, 2.0], [NAN, NAN]])
    found = total_rewards(rewards, torch.tensor([1.0, 0.25]))
    assert found[:2].tolist() == [1.5, 0.5]
    assert found[2].isnan()


def test_overlong_penalty_when_compared_equals_trl() -> None:
    lengths = [0, 79, 80, 81, 90, 100, 101, 500]
    found = overlong_penalty(torch.tensor(lengths), 100, 20)
    close(found, trl_overlong(lengths, 100, 20))
    close(found, [0, 0, 0, -0.05, -0.5, -1, -1, -1])


def test_without_truncated_when_some_are_cut_off_leaves_them_out() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert without_truncated(mask, torch.tensor([False, True])).tolist() == [[True, True, False], [False] * 3]
