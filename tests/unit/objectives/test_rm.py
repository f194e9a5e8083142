"""Stage rm: its loss and figures against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from fourfold.dataset.batch import Example, Sample
from fourfold.dataset.collate import CutPolicy, cut
from fourfold.objectives.rm import RewardObjective
from fourfold.parallel.loss import Outputs
from fourfold.parallel.terms import LossTerms

_LAST = {2: 0.5, 3: -1.0, 4: 2.0}
"""The value of a sequence by its length."""


def found_for(*lengths: tuple[int, int]) -> tuple[LossTerms, dict[str, float]]:
    """Terms and denominators for pairs of sequences whose hidden states say how long they are."""
    samples = [
        Sample({role: Example([5] * n, [5] * n) for role, n in zip(("chosen", "rejected"), pair, strict=True)}, i)
        for i, pair in enumerate(lengths)
    ]
    [batch] = cut(samples, CutPolicy(packed=True, max_tokens=100))
    objective = RewardObjective()
    [ready] = objective.prepare([batch], None)  # type: ignore[arg-type] - nothing is asked
    hidden = torch.tensor([_LAST[n] if at == n - 1 else 100.0 for pair in lengths for n in pair for at in range(n)])
    outputs = Outputs(hidden[None, :, None], lambda x: x, value=lambda x: x.squeeze(-1))
    return objective.loss(outputs, ready), objective.denominators([ready])


def test_rm_when_pairs_have_known_rewards_has_the_loss_and_figures_of_the_formula() -> None:
    found, denominators = found_for((2, 3), (2, 4))
    assert denominators == {"pairs": 2.0, "tokens": 11.0}
    expected = math.log(1 + math.exp(-1.5)) + math.log(1 + math.exp(1.5))
    assert float(found.terms["preference"].total) == pytest.approx(expected, abs=1e-6)
    sums = {name: float(term.total) for name, term in found.metrics.items()}
    expected = {"rewards/chosen": 1.0, "rewards/rejected": 1.0, "rewards/margins": 0.0, "rewards/accuracies": 1.0}
    assert sums == pytest.approx(expected)
    assert {term.denominator for term in (*found.terms.values(), *found.metrics.values())} == {"pairs"}


def test_rm_when_both_answers_have_the_same_reward_is_right_half_of_the_time() -> None:
    found, _ = found_for((4, 4))
    assert float(found.metrics["rewards/accuracies"].total) == 0.5
    assert float(found.terms["preference"].total) == pytest.approx(math.log(2), abs=1e-6)


def test_rm_when_it_evaluates_tells_the_accuracy_by_its_short_name_too() -> None:
    with torch.no_grad():
        found, _ = found_for((2, 3), (2, 4))
    assert float(found.metrics["accuracy"].total) == 1.0
