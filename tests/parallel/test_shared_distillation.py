"""Ranks that share the vocabulary find the divergence and the gradient of one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from torch import Tensor

from fourfold.losses.distillation import distillation_loss

_SHARES = (0, 20, 37)


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_distillation_loss_when_ranks_share_the_vocabulary_equals_one_process(beta: float) -> None:
    student, teacher = 2 * torch.randn(2, 5, 37, generator=torch.Generator().manual_seed(0))
    weights = torch.linspace(-1, 2, 5)

    def find(start: int, stop: int, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
        own = student[:, start:stop].clone().requires_grad_()
        losses = distillation_loss(own, teacher[:, start:stop], beta=beta, temperature=1.5, chunk=8, group=group)
        return losses.detach(), torch.autograd.grad(torch.dot(losses, weights), own)[0]

    def work() -> tuple[Tensor, Tensor]:
        rank = dist.get_rank()
        return find(_SHARES[rank], _SHARES[rank + 1], dist.group.WORLD)

    wanted, wanted_grad = find(0, 37, None)
    found = run_ranks(2, work)
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][0], wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.cat([grad for _, grad in found], 1), wanted_grad, rtol=1e-5, atol=1e-6)
