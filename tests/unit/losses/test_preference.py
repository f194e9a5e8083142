"""Losses on pairs: equal to TRL's on the same logits, in value and gradient, and finite at the limits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fourfold.base.errors import ConfigError
from fourfold.losses.preference import (
    PairCounts,
    PairLogps,
    PreferenceBaselines,
    PreferenceKind,
    PreferenceLosses,
    PreferenceSettings,
    RunningMean,
    bco_loss,
    chosen_nll,
    index_in_row,
    length_weights,
    preference_loss,
    sum_by_row,
)
from trl_losses import Answers, make_answers, trl_dpo, trl_orpo, trl_simpo, trl_smoothed_sigmoid

LENGTHS = (4, 6, 2, 5, 3, 6)
TRL_NAMES = {"exo": "exo_pair", "sppo": "sppo_hard"}
REFERENCED: tuple[PreferenceKind, ...] = ("sigmoid", "hinge", "ipo", "robust", "exo", "sppo")
ALL: tuple[PreferenceKind, ...] = (*REFERENCED, "kto_pair", "orpo", "simpo")


def close(found: Tensor, wanted: Tensor | float) -> None:
    """Equal within 1e-6, absolute for small numbers and relative for large ones."""
    torch.testing.assert_close(found, torch.as_tensor(wanted, dtype=torch.float32), rtol=1e-6, atol=1e-6)


def pairs_of(answers: Answers, ld_alpha: float | None = None) -> tuple[PairLogps, PairLogps, PairCounts]:
    """Policy, reference and counts of answers whose first half is chosen."""
    rows, num_rows = torch.nonzero(answers.mask[:, 1:])[:, 0], len(answers.mask)
    counts = answers.mask.sum(-1)
    shared = torch.minimum(*counts.chunk(2)).repeat(2).index_select(0, rows)
    weights = None if ld_alpha is None else length_weights(index_in_row(rows, num_rows), shared, ld_alpha)

    def summed(logits: Tensor) -> PairLogps:
        token_logps = answers.token_logps(logits)[answers.mask[:, 1:].bool()]
        return PairLogps(*sum_by_row(token_logps, rows, num_rows, weights).chunk(2))

    return summed(answers.logits), summed(answers.reference_logits), PairCounts(*counts.chunk(2))


def ours(answers: Answers, **settings: Any) -> PreferenceLosses:
    """The losses of answers whose first half is chosen."""
    policy, reference, counts = pairs_of(answers)
    return preference_loss(policy, reference, counts, PreferenceSettings(**settings))


def same_gradient(first: Tensor, second: Tensor, logits: Tensor) -> None:
    """Both scalars have the same gradient by the logits, and it is not 0."""
    (wanted,), (found,) = torch.autograd.grad(second, logits), torch.autograd.grad(first, logits)
    assert wanted.abs().max() > 1e-4
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", REFERENCED)
@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_preference_loss_when_referenced_equals_trl(kind: PreferenceKind, beta: float) -> None:
    answers = make_answers(LENGTHS)
    smoothing = 0.2 if kind in ("robust", "exo") else 0.0
    result = ours(answers, loss=kind, beta=beta, label_smoothing=smoothing)
    loss, metrics = trl_dpo(answers, beta=beta, loss_types=[TRL_NAMES.get(kind, kind)], label_smoothing=smoothing)
    close(result.losses.mean(), loss)
    same_gradient(result.losses.mean(), loss, answers.logits)
    if kind != "ipo":  # whose rewards are of averages here
        close(result.chosen_rewards.mean(), metrics["rewards/chosen"])
        close(result.rejected_rewards.mean(), metrics["rewards/rejected"])
        correct = (result.chosen_rewards > result.rejected_rewards).float().mean()
        close(correct, metrics["rewards/accuracies"])


@pytest.mark.parametrize("kind", REFERENCED)
def test_preference_loss_when_referenced_equals_trl_pair_by_pair(kind: PreferenceKind) -> None:
    smoothing = 0.1 if kind in ("robust", "exo") else 0.0
    for seed, lengths in enumerate([(3, 5), (6, 2), (4, 4)]):
        answers = make_answers(lengths, seed=seed)
        result = ours(answers, loss=kind, label_smoothing=smoothing)
        loss, _ = trl_dpo(answers, loss_types=[TRL_NAMES.get(kind, kind)], label_smoothing=smoothing)
        assert result.losses.shape == (1,)
        close(result.losses[0], loss)


def test_preference_loss_when_ipo_gives_rewards_of_averages() -> None:
    answers = make_answers(LENGTHS)
    policy, reference, counts = pairs_of(answers)
    result = ours(answers, loss="ipo", beta=0.3)
    close(result.chosen_rewards, 0.3 * (policy.chosen - reference.chosen) / counts.chosen)


def test_preference_loss_when_labels_are_smoothed_equals_trl() -> None:
    answers = make_answers(LENGTHS)
    policy, reference, _ = pairs_of(answers)
    margins = policy.chosen - reference.chosen - policy.rejected + reference.rejected
    result = ours(answers, beta=0.4, label_smoothing=0.15)
    close(result.losses, trl_smoothed_sigmoid(margins, 0.4, 0.15))


def test_preference_loss_when_exo_has_no_smoothing_takes_a_thousandth() -> None:
    answers = make_answers(LENGTHS)
    loss, _ = trl_dpo(answers, loss_types=["exo_pair"], label_smoothing=1e-3)
    close(ours(answers, loss="exo").losses.mean(), loss)


def test_preference_loss_when_orpo_equals_trl() -> None:
    for seed, lengths in enumerate([(3, 5), (6, 2), (4, 4)]):
        # Of one pair whose prompt is one token, TRL's SFT loss is over the chosen answer, as ours always is.
        answers = make_answers(lengths, prompt=1, seed=seed)
        result = ours(answers, loss="orpo", beta=0.3)
        loss, metrics = trl_orpo(answers, 0.3)
        close(result.losses[0], loss)
        same_gradient(result.losses[0], loss, answers.logits)
        close(result.chosen_rewards[0], metrics["rewards/chosen"])
        close(result.rejected_rewards[0], metrics["rewards/rejected"])


def test_preference_loss_when_simpo_equals_trl() -> None:
    answers = make_answers(LENGTHS)
    result = ours(answers, loss="simpo", beta=2.0, simpo_gamma=0.7)
    loss, metrics = trl_simpo(answers, 2.0, 0.7)
    close(result.losses.mean(), loss)
    same_gradient(result.losses.mean(), loss, answers.logits)
    close(result.chosen_rewards.mean(), metrics["rewards/chosen"])
    close(result.rejected_rewards.mean(), metrics["rewards/rejected"])


def test_preference_loss_when_kto_pair_equals_its_formula() -> None:
    beta, chosen, rejected = 0.5, [1.0, 4.0, -2.0], [0.5, -3.0, -2.0]
    # KL of the chosen is 1; that of the rejected is -1.5, which counts as 0.
    wanted = [
        (1 / (1 + math.exp(0.5 * c)) + 1 / (1 + math.exp(0.5 * (1 - r)))) / 2
        for c, r in zip(chosen, rejected, strict=True)
    ]
    policy = PairLogps(torch.tensor(chosen) - 7, torch.tensor(rejected) - 9)
    reference = PairLogps(torch.full((3,), -7.0), torch.full((3,), -9.0))
    counts = PairCounts(torch.ones(3), torch.ones(3))
    settings = PreferenceSettings("kto_pair", beta)
    close(preference_loss(policy, reference, counts, settings).losses, torch.tensor(wanted))
    given = PreferenceBaselines(chosen_kl=torch.tensor(1.0), rejected_kl=torch.tensor(-1.5))
    first = PairLogps(policy.chosen[:1], policy.rejected[:1]), PairLogps(reference.chosen[:1], reference.rejected[:1])
    close(preference_loss(*first, counts, settings, given).losses[0], wanted[0])


def test_preference_loss_when_kto_pair_sends_no_gradient_through_its_baselines() -> None:
    chosen, rejected = torch.tensor([2.0, 1.0]).requires_grad_(), torch.tensor([1.0, 3.0]).requires_grad_()
    zeros, counts = PairLogps(torch.zeros(2), torch.zeros(2)), PairCounts(*torch.ones(2, 2))
    losses = preference_loss(PairLogps(chosen, rejected), zeros, counts, PreferenceSettings("kto_pair", 1.0)).losses
    grads = torch.autograd.grad(losses.sum(), (chosen, rejected))
    # sigmoid(2 - chosen) and sigmoid(rejected - 1.5), the other kind's means, each halved
    for grad, excess, sign in zip(grads, ([0.0, 1.0], [-0.5, 1.5]), (-1, 1), strict=True):
        sigmoid = torch.tensor(excess).sigmoid()
        close(grad, sign * sigmoid * (1 - sigmoid) / 2)


@pytest.mark.parametrize("delta", [0.0, 0.35])
@pytest.mark.parametrize("kind", ["sigmoid", "hinge"])
def test_preference_loss_when_bco_is_added_equals_trl(kind: PreferenceKind, delta: float) -> None:
    beta, weight = 0.4, 0.25
    answers = make_answers(LENGTHS)
    policy, reference, counts = pairs_of(answers)
    settings = PreferenceSettings(kind, beta, bco_weight=weight)
    baselines = PreferenceBaselines(bco_delta=torch.tensor(delta))
    losses = preference_loss(policy, reference, counts, settings, baselines).losses
    # TRL's classifier has no delta: moving both references by delta / beta has the same effect, and none on margins.
    loss, _ = trl_dpo(
        answers,
        beta=beta,
        loss_types=[kind, "bco_pair"],
        loss_weights=[1 / (1 + weight), weight / (1 + weight)],
        reference_shift=delta / beta,
    )
    close(losses.mean(), loss)
    same_gradient(losses.mean(), loss, answers.logits)


def test_bco_loss_when_rewards_equal_delta_is_twice_ln_2() -> None:
    rewards = torch.tensor([0.3, 0.3])
    close(bco_loss(rewards, rewards, torch.tensor(0.3)), torch.full((2,), 2 * math.log(2)))


def test_running_mean_when_updated_is_the_mean_of_all() -> None:
    seen = RunningMean().updated(6.0, 3).updated(-2.0, 1)
    assert RunningMean().mean == 0.0
    assert (seen.total, seen.count, seen.mean) == (4.0, 4, 1.0)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_sum_by_row_when_long_answers_are_weighted_equals_trl(alpha: float) -> None:
    answers = make_answers(LENGTHS)
    policy, reference, counts = pairs_of(answers, ld_alpha=alpha)
    losses = preference_loss(policy, reference, counts, PreferenceSettings(beta=0.3)).losses
    loss, metrics = trl_dpo(answers, beta=0.3, ld_alpha=alpha)
    close(losses.mean(), loss)
    close(policy.chosen.mean(), metrics["logps/chosen"])
    close(policy.rejected.mean(), metrics["logps/rejected"])
    same_gradient(losses.mean(), loss, answers.logits)


def test_length_weights_when_answers_differ_in_length_weigh_the_tail() -> None:
    rows = torch.tensor([0, 0, 0, 1, 3, 3])
    index = index_in_row(rows, 4)
    assert index.tolist() == [0, 1, 2, 0, 0, 1]
    weights = length_weights(index, torch.tensor([1, 1, 1, 1, 2, 2]), 0.25)
    assert weights.tolist() == [1.0, 0.25, 0.25, 1.0, 1.0, 1.0]
    logps = torch.tensor([-1.0, -2.0, -4.0, -8.0, -1.0, -3.0])
    assert sum_by_row(logps, rows, 4, weights).tolist() == [-2.5, -8.0, 0.0, -4.0]


def test_chosen_nll_when_added_equals_trl_sft_loss() -> None:
    answers = make_answers((5, 3))
    policy, reference, counts = pairs_of(answers)
    losses = preference_loss(policy, reference, counts, PreferenceSettings()).losses
    losses = losses + 0.8 * chosen_nll(policy.chosen, counts.chosen)
    loss, _ = trl_dpo(answers, loss_types=["sigmoid", "sft"], loss_weights=[1.0, 0.8])
    close(losses.mean(), loss)
    same_gradient(losses.mean(), loss, answers.logits)


def test_chosen_nll_when_an_answer_is_empty_is_0() -> None:
    close(chosen_nll(torch.tensor([0.0, -6.0]), torch.tensor([0, 3])), torch.tensor([0.0, 2.0]))


def one_pair(kind: PreferenceKind, chosen: float, rejected: float, **settings: Any) -> tuple[float, float, float]:
    """Loss, and its gradients by the policy's two log-probabilities, of one pair of one-token answers; the
    reference gives -1 to both."""
    made = torch.tensor([chosen]).requires_grad_(), torch.tensor([rejected]).requires_grad_()
    reference, ones = PairLogps(torch.tensor([-1.0]), torch.tensor([-1.0])), torch.ones(1)
    losses = preference_loss(PairLogps(*made), reference, PairCounts(ones, ones), PreferenceSettings(kind, **settings))
    grads = torch.autograd.grad(losses.losses.sum(), made)
    return losses.losses.item(), grads[0].item(), grads[1].item()


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("sigmoid", math.log(2)),
        ("robust", math.log(2)),
        ("hinge", 1.0),
        ("ipo", 25.0),  # (1 / (2 * 0.1))^2
        ("sppo", 50.0),
        ("kto_pair", 0.5),
        # KL of (1/2, 1/2) from (1 - e, e)
        ("exo", 0.5 * (math.log(0.5 / 0.999) + math.log(0.5 / 0.001))),
        ("orpo", 1.0 + 0.1 * math.log(2)),
        ("simpo", math.log(1 + math.exp(0.5))),
    ],
)
def test_preference_loss_when_policy_is_the_reference_has_its_known_value(kind: PreferenceKind, wanted: float) -> None:
    loss, _, _ = one_pair(kind, -1.0, -1.0)
    assert loss == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("kind", [kind for kind in ALL if kind not in ("ipo", "sppo")])
def test_preference_loss_when_beta_is_0_is_that_of_no_preference(kind: PreferenceKind) -> None:
    loss, of_chosen, of_rejected = one_pair(kind, -3.0, -2.0, beta=0.0)
    wanted = {"hinge": 1.0, "kto_pair": 0.5, "orpo": 3.0, "simpo": math.log(1 + math.exp(0.5))}
    wanted["exo"] = 0.5 * (math.log(0.5 / 0.999) + math.log(0.5 / 0.001))
    assert loss == pytest.approx(wanted.get(kind, math.log(2)), rel=1e-6)
    assert of_rejected == 0.0
    assert of_chosen == (-1.0 if kind == "orpo" else 0.0)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize(("chosen", "rejected"), [(-1e4, -1e-3), (-1e-3, -1e4), (0.0, 0.0), (0.0, -1e4), (-1e4, 0.0)])
def test_preference_loss_when_margins_are_extreme_stays_finite(
    kind: PreferenceKind, chosen: float, rejected: float
) -> None:
    settings = {"label_smoothing": 0.1} if kind in ("sigmoid", "robust", "exo") else {}
    assert all(math.isfinite(number) for number in one_pair(kind, chosen, rejected, beta=1.0, **settings))


@pytest.mark.parametrize("kind", ALL)
def test_preference_loss_when_answers_are_empty_is_finite(kind: PreferenceKind) -> None:
    zeros = torch.zeros(2)
    settings = PreferenceSettings(kind)
    result = preference_loss(PairLogps(zeros, zeros), PairLogps(zeros, zeros), PairCounts(zeros, zeros), settings)
    assert result.losses.isfinite().all()
    assert result.chosen_rewards.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("kind", ALL)
def test_preference_loss_when_logps_are_half_precision_is_fp32_and_detaches_rewards(kind: PreferenceKind) -> None:
    chosen, rejected = (torch.tensor([value], dtype=torch.bfloat16).requires_grad_() for value in (-2.0, -3.0))
    reference, ones = PairLogps(rejected.detach(), chosen.detach()), torch.ones(1)
    settings = PreferenceSettings(kind)
    result = preference_loss(PairLogps(chosen, rejected), reference, PairCounts(ones, ones), settings)
    assert result.losses.dtype == result.chosen_rewards.dtype == torch.float32
    assert result.losses.requires_grad
    assert not result.chosen_rewards.requires_grad
    assert not result.rejected_rewards.requires_grad


def test_preference_loss_when_reference_has_a_gradient_sends_none_to_it() -> None:
    logps = [torch.tensor([-1.0]).requires_grad_() for _ in range(4)]
    ones = torch.ones(1)
    losses = preference_loss(
        PairLogps(logps[0], logps[1]), PairLogps(logps[2], logps[3]), PairCounts(ones, ones), PreferenceSettings()
    ).losses
    grads = torch.autograd.grad(losses.sum(), logps, allow_unused=True)
    assert grads[0] is not None
    close(grads[0], torch.tensor([-0.05]))  # -beta * sigmoid(0)
    assert grads[2] is None
    assert grads[3] is None


def test_preference_loss_when_gradients_are_checked_numerically_agrees() -> None:
    ratios = torch.tensor([0.3, -0.7, 1.9])
    for kind in REFERENCED:
        for sign in (1, -1):
            step, zeros = 1e-2, torch.zeros(3)
            settings = PreferenceSettings(kind, 0.5)

            def total(moved: Tensor, settings: PreferenceSettings = settings, zeros: Tensor = zeros) -> Tensor:
                counts = PairCounts(zeros + 1, zeros + 1)
                return preference_loss(PairLogps(moved, -moved), PairLogps(zeros, zeros), counts, settings).losses

            leaf = (sign * ratios).requires_grad_()
            (grad,) = torch.autograd.grad(total(leaf).sum(), leaf)
            slope = (total(leaf.detach() + step) - total(leaf.detach() - step)) / (2 * step)
            torch.testing.assert_close(grad, slope, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"loss": "ipo", "beta": 0.0}, "pref_beta: 0"),
        ({"loss": "sppo", "beta": 0.0}, "pref_beta: 0"),
        ({"loss": "hinge", "label_smoothing": 0.1}, "dpo_label_smoothing: 0.1 has no meaning for pref_loss hinge"),
        ({"loss": "robust", "label_smoothing": 0.5}, "dpo_label_smoothing: 0.5 leaves pref_loss robust"),
        ({"loss": "simpo", "bco_weight": 0.5}, "pref_bco_weight: 0.5 needs a reference"),
    ],
)
def test_preference_settings_when_numbers_do_not_go_together_say_so(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PreferenceSettings(**settings)
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith(words)


def test_preference_losses_when_added_up_equal_torch_on_plain_numbers() -> None:
    policy = PairLogps(torch.tensor([-4.0, -9.0]), torch.tensor([-6.0, -5.0]))
    reference = PairLogps(torch.tensor([-5.0, -8.0]), torch.tensor([-5.0, -7.0]))
    result = preference_loss(policy, reference, PairCounts(*torch.ones(2, 2)), PreferenceSettings(beta=0.5))
    close(result.losses, F.softplus(torch.tensor([-1.0, 1.5])))  # margins 0.5 * (1 + 1) and 0.5 * (-1 - 2)
    assert result.chosen_rewards.tolist() == [0.5, -0.5]
    assert result.rejected_rewards.tolist() == [-0.5, 1.0]
