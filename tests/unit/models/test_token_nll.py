"""Likelihoods whose logits become their gradient, against PyTorch's cross entropy."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fourfold.dataset.batch import IGNORE_INDEX
from fourfold.models.token_nll import token_nll


def test_token_nll_when_compared_with_cross_entropy_gives_the_same() -> None:
    logits = torch.randn(7, 11, dtype=torch.float64).float().requires_grad_()
    targets = torch.tensor([0, 10, IGNORE_INDEX, 3, 3, IGNORE_INDEX, 9])
    weights = torch.randn(7)
    other = logits.detach().clone().requires_grad_()
    expected = F.cross_entropy(other, targets, reduction="none")
    found = token_nll(logits, targets)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(logits.grad, other.grad, rtol=1e-5, atol=1e-6)
