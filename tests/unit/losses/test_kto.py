"""KTO: equal to TRL's on the same logits, in value and gradient, and finite at the limits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fourfold.losses.kto import KtoSettings, kl_baseline, kl_sum, kto_loss
from trl_losses import Answers, make_answers, trl_kto

DESIRABLE = torch.tensor([True, False, True, True, False])


def close(found: Tensor, wanted: Tensor | float) -> None:
    """Equal within 1e-6."""
    torch.testing.assert_close(found, torch.as_tensor(wanted, dtype=torch.float32), rtol=1e-6, atol=1e-6)


def summed(answers: Answers) -> tuple[Tensor, Tensor]:
    """[B] under the policy and the reference."""
    return answers.token_logps(answers.logits).sum(-1), answers.token_logps(answers.reference_logits).sum(-1)


@pytest.mark.parametrize("desirable", [DESIRABLE, torch.ones(5).bool(), torch.zeros(5).bool()])
@pytest.mark.parametrize("kl_seed", [0, 7])
def test_kto_loss_when_compared_equals_trl(desirable: Tensor, kl_seed: int) -> None:
    answers, kl_answers = make_answers((4, 6, 2, 5, 3)), make_answers((6, 2, 5, 3, 4), seed=kl_seed)
    loss, metrics = trl_kto(answers, desirable, kl_answers, beta=0.4, desirable_weight=1.3, undesirable_weight=0.7)
    baseline = kl_baseline(kl_sum(*summed(kl_answers)), 5)
    close(baseline, metrics["kl"])
    result = kto_loss(*summed(answers), desirable, baseline, KtoSettings(0.4, 1.3, 0.7))
    close(result.losses.mean(), loss)
    (wanted,), (found,) = (torch.autograd.grad(x, answers.logits) for x in (loss, result.losses.mean()))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    for name, tagged in (("chosen", desirable), ("rejected", ~desirable)):
        if tagged.any():
            close(result.rewards[tagged].mean(), metrics[f"rewards/{name}"])


def test_kl_seeds_when_compared_cover_both_sides_of_0() -> None:
    totals = [kl_sum(*summed(make_answers((6, 2, 5, 3, 4), seed=seed))).item() for seed in (0, 7)]
    assert min(totals) < 0 < max(totals)


def test_kl_baseline_when_summed_in_parts_equals_the_whole() -> None:
    logps, reference = torch.tensor([-3.0, -5.0, -2.0]), torch.tensor([-4.0, -4.5, -4.0])
    total = kl_sum(logps[:1], reference[:1]) + kl_sum(logps[1:], reference[1:])
    close(kl_baseline(total, 3), 2.5 / 3)
    assert kl_baseline(torch.tensor(-1.0), torch.tensor(2)).item() == 0.0
    assert kl_baseline(torch.tensor(0.0), 0).item() == 0.0


def test_kl_sum_when_logps_have_a_gradient_has_none() -> None:
    logps = torch.tensor([-3.0]).requires_grad_()
    assert not kl_sum(logps, torch.tensor([-4.0])).requires_grad
    assert kl_sum(torch.zeros(0), torch.zeros(0)).item() == 0.0


def test_kto_loss_when_policy_is_the_reference_is_half_the_weight() -> None:
    logps = torch.tensor([-3.0, -3.0])
    result = kto_loss(logps, logps, torch.tensor([True, False]), torch.tensor(0.0), KtoSettings(0.1, 2.0, 3.0))
    assert result.losses.tolist() == [1.0, 1.5]
    assert result.rewards.tolist() == [0.0, 0.0]


def test_kto_loss_when_beta_is_0_is_half_the_weight() -> None:
    tags = torch.tensor([True, False])
    result = kto_loss(torch.tensor([-1e4, -1.0]), torch.tensor([-1.0, -9.0]), tags, torch.tensor(5.0), KtoSettings(0.0))
    assert result.losses.tolist() == [0.5, 0.5]


def test_kto_loss_when_written_out_equals_its_formula() -> None:
    result = kto_loss(
        torch.tensor([-3.0, -3.0]), torch.tensor([-5.0, -5.0]), torch.tensor([True, False]), torch.tensor(0.5),
        KtoSettings(0.2),
    )  # fmt: skip
    excess = 0.2 * (2 - 0.5)
    close(result.losses, torch.tensor([1 / (1 + math.exp(excess)), 1 / (1 + math.exp(-excess))]))
    close(result.rewards, torch.tensor([0.4, 0.4]))


def test_kto_loss_when_ratios_are_extreme_stays_finite() -> None:
    logps = torch.tensor([-1e5, 0.0, -1e5, 0.0]).requires_grad_()
    tags = torch.tensor([True, True, False, False])
    losses = kto_loss(logps, torch.tensor([0.0, -1e5, 0.0, -1e5]), tags, torch.tensor(0.0), KtoSettings(1.0)).losses
    assert losses.tolist() == [1.0, 0.0, 0.0, 1.0]
    (grad,) = torch.autograd.grad(losses.sum(), logps)
    assert grad.isfinite().all()


def test_kto_loss_when_baseline_is_below_0_counts_it_as_0() -> None:
    one, tag = torch.tensor([-1.0]), torch.tensor([True])
    assert kto_loss(one, one, tag, torch.tensor(-7.0), KtoSettings()).losses.item() == 0.5
