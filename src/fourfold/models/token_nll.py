"""Negative log-likelihoods without a copy of the logits in fp32: their gradient takes the logits' place.

On a GPU by kernels of our own (parallel/nll_kernel.py); elsewhere the same arithmetic as PyTorch has it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fourfold.dataset.batch import IGNORE_INDEX


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihoods: logits [N, V], targets [N] -> [N] fp32, 0 for IGNORE_INDEX.

    The backward pass writes the gradient over the logits, so nobody else may need them then.
    """
    # a part of a longer tensor begins anywhere, and kernels are compiled anew for an address that is no multiple of 16
    return _TokenNll.apply(logits, targets.clone())  # type: ignore[return-value]


class _TokenNll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """logits [N, V], targets [N] -> [N] fp32."""
        if logits.is_cuda:
            from fourfold.parallel.nll_kernel import nll_of

            nll, totals = nll_of(logits, targets, IGNORE_INDEX)
        else:
            nll, totals = _nll_of(logits, targets)
        ctx.save_for_backward(logits, targets, totals)
        return nll

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """grad [N]."""
        logits, targets, totals = ctx.saved_tensors
        logits = logits.detach()
        if logits.is_cuda:
            from fourfold.parallel.nll_kernel import become_gradient

            become_gradient(logits, targets, totals, grad, IGNORE_INDEX)
        else:
            _become_gradient(logits, targets, totals, grad)
        return logits, None


def _nll_of(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    wanted = logits.gather(1, targets.clamp(min=0)[:, None])[:, 0].float()
    totals = torch.logsumexp(logits.float(), dim=-1)
    return torch.where(targets == IGNORE_INDEX, 0.0, totals - wanted), totals


def _become_gradient(logits: Tensor, targets: Tensor, totals: Tensor, grad: Tensor) -> None:
    probabilities = torch.exp(logits.float() - totals[:, None])
    is_target = torch.arange(logits.shape[1], device=logits.device)[None] == targets[:, None]
    grad = torch.where(targets == IGNORE_INDEX, 0.0, grad)
    logits.copy_((probabilities - is_target.float()) * grad[:, None])
