"""The loss over tokens, plain and dynamic, against the formula on whole logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fourfold.dataset.batch import IGNORE_INDEX, Example, Sample
from fourfold.dataset.collate import CutPolicy, cut
from fourfold.losses.token import TokenLoss
from fourfold.parallel.loss import Outputs

_VOCABULARY, _HIDDEN = 11, 7


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_loss_when_tokens_are_scored_has_value_and_gradient_of_the_formula(dynamic: bool, frozen: bool) -> None:
    torch.manual_seed(0)
    rows = [[1, 4, 2, 9, 3], [5, 6, 10]]
    samples = [Sample({"": Example(ids, [IGNORE_INDEX, *ids[1:-1], ids[-1]])}, index) for index, ids in enumerate(rows)]
    [batch] = cut(samples, CutPolicy(packed=True, max_tokens=100))
    head, table = torch.randn(_VOCABULARY, _HIDDEN), torch.randn(_VOCABULARY, _HIDDEN)
    found, wanted = (table.clone().requires_grad_() for _ in range(2))
    objective = TokenLoss(dynamic=dynamic)
    outputs = Outputs(found[batch.input_ids], lambda hidden: hidden @ head.T, head_is_frozen=frozen)
    total = objective.loss(outputs, batch).terms["nll"].total
    # LLaMA-Factory: cross entropy times exp(-cross entropy), which is no part of the graph, over all trained tokens.
    expected = torch.zeros(())
    for ids in rows:
        nll = F.cross_entropy(wanted[ids[:-1]] @ head.T, torch.tensor(ids[1:]), reduction="none")
        expected = expected + (nll * torch.exp(-nll).detach() if dynamic else nll).sum()
    assert objective.denominators([batch]) == {"targets": 6.0, "target_count": 6.0, "tokens": 8.0}
    torch.testing.assert_close(total, expected)
    total.backward()
    expected.backward()
    torch.testing.assert_close(found.grad, wanted.grad)
