"""Gradients that are added together are those that the backward pass adds one by one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fourfold.parallel import gradients
from fourfold.parallel.gradients import add_gradients


@pytest.mark.parametrize("most", [0, 2**26])  # one by one, and together
def test_gradients_when_added_together_are_what_backward_adds(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "_MOST_TOGETHER", most)
    torch.manual_seed(0)
    one = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    one.register_parameter("unused", nn.Parameter(torch.ones(4)))
    one[0].bias.requires_grad_(False)
    other = copy.deepcopy(one)
    trained = [parameter for parameter in other.parameters() if parameter.requires_grad]
    places = []
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
        places.append(parameter.grad.data_ptr())
    for _ in range(2):
        x = torch.randn(7, 3)
        one(x).square().sum().backward()
        add_gradients(other(x).square().sum(), trained)
    for expected, found in zip(one.parameters(), other.parameters(), strict=True):
        if expected.grad is not None:
            assert found.grad is not None
            torch.testing.assert_close(found.grad, expected.grad)
    assert one[2].weight.grad is not None
    assert [p.grad.data_ptr() for p in trained if p.grad is not None] == places
