"""The reward model's loss: equal to TRL's on the same rewards, in value and gradient, and finite at the limits."""

from __future__ import annotations

import math

import pytest
import torch

from fourfold.losses.reward import reward_loss
from trl_losses import trl_reward


@pytest.mark.parametrize("with_margin", [False, True])
@pytest.mark.parametrize("centering", [0.0, 0.01])
def test_reward_loss_when_compared_equals_trl(with_margin: bool, centering: float) -> None:
    generator = torch.Generator().manual_seed(0)
    rewards = (3 * torch.randn(10, generator=generator)).requires_grad_()
    margin = torch.rand(5, generator=generator) if with_margin else None
    loss, metrics = trl_reward(rewards, margin, centering or None)
    result = reward_loss(*rewards.chunk(2), margin, centering)
    assert result.losses.shape == (5,)
    torch.testing.assert_close(result.losses.mean(), loss, rtol=1e-6, atol=1e-6)
    (wanted,), (found,) = (torch.autograd.grad(x, rewards) for x in (loss, result.losses.mean()))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert result.correct.float().mean().item() == pytest.approx(metrics["accuracy"], abs=1e-6)
    assert result.margins.mean().item() == pytest.approx(metrics["margin"], abs=1e-6)


def test_reward_loss_when_rewards_are_equal_is_ln_2_and_not_correct() -> None:
    result = reward_loss(torch.tensor([1.5]), torch.tensor([1.5]))
    assert result.losses.item() == pytest.approx(math.log(2), rel=1e-6)
    assert result.correct.tolist() == [False]


def test_reward_loss_when_rewards_are_extreme_stays_finite() -> None:
    rewards = torch.tensor([1e5, -1e5]).requires_grad_()
    result = reward_loss(rewards, rewards.flip(0))
    assert result.losses.tolist() == [0.0, 2e5]
    (grad,) = torch.autograd.grad(result.losses.sum(), rewards)
    assert grad.tolist() == [1.0, -1.0]  # of r_0 - r_1, the loss of the wrong pair
    assert result.correct.tolist() == [True, False]


def test_reward_loss_when_rewards_are_half_precision_is_fp32() -> None:
    result = reward_loss(*torch.ones(2, 3, dtype=torch.bfloat16).requires_grad_())
    assert result.losses.dtype == torch.float32
    assert not result.margins.requires_grad
