"""Triton kernels of the loss: negative log-likelihoods of logits, and the logits' gradient in their place.

A compiler's kernels read what belongs to a row again for each of its numbers, and take about twice the time that
memory needs (docs/lab-notes.md).

Imported only where it runs: on CUDA, where PyTorch brings Triton along.

Shape legend: N targets, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_BLOCK = 4096
"""Numbers of a row that a program has at a time."""
_WARPS = 8


@triton.jit
def _nll(  # no annotations but constexpr: the compiler reads them
    logits, targets, nll, totals, ignored: tl.constexpr, vocabulary: tl.constexpr, block: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocabulary
    most, total = float("-inf"), 0.0
    for start in range(0, vocabulary, block):
        place = start + tl.arange(0, block)
        x = tl.load(logits + place, mask=place < vocabulary, other=float("-inf")).to(tl.float32) * _LOG2_E
        now = tl.maximum(most, tl.max(x, 0))
        total = total * tl.exp2(most - now) + tl.sum(tl.exp2(x - now), 0)
        most = now
    total = (most + tl.log2(total)) * _LN_2
    target = tl.load(targets + row)
    wanted = tl.load(logits + tl.where(target == ignored, 0, target)).to(tl.float32)
    tl.store(nll + row, tl.where(target == ignored, 0.0, total - wanted))
    tl.store(totals + row, total)


@triton.jit
def _gradient(  # no annotations but constexpr: the compiler reads them
    logits, targets, totals, grads, ignored: tl.constexpr, vocabulary: tl.constexpr, block: tl.constexpr
):
    blocks: tl.constexpr = (vocabulary + block - 1) // block
    row = (tl.program_id(0) // blocks).to(tl.int64)
    place = tl.program_id(0) % blocks * block + tl.arange(0, block)
    target = tl.load(targets + row)
    total = tl.load(totals + row)
    grad = tl.where(target == ignored, 0.0, tl.load(grads + row))
    logits += row * vocabulary
    x = tl.load(logits + place, mask=place < vocabulary, other=float("-inf")).to(tl.float32)
    p = tl.exp2((x - total) * _LOG2_E)
    found = (p - tl.where(place == target, 1.0, 0.0)) * grad
    tl.store(logits + place, found.to(logits.dtype.element_ty), mask=place < vocabulary)


def nll_of(logits: Tensor, targets: Tensor, ignored: int) -> tuple[Tensor, Tensor]:
    """Negative log-likelihoods, and log sum exp of the logits: [N] fp32 each.

    Args:
        logits: [N, V] in 16 or 32 bits, contiguous.
        targets: [N] int64; `ignored` where there is none, whose likelihood is 0.
    """
    assert logits.is_contiguous() and targets.is_contiguous()
    # apart: a kernel is compiled anew for an address that is no multiple of 16
    nll, totals = (torch.empty(len(logits), dtype=torch.float32, device=logits.device) for _ in range(2))
    launch: Any = _nll
    if len(logits):
        launch[(len(logits),)](logits, targets, nll, totals, ignored, logits.shape[1], _BLOCK, num_warps=_WARPS)
    return nll, totals


def become_gradient(logits: Tensor, targets: Tensor, totals: Tensor, grads: Tensor, ignored: int) -> None:
    """Write the logits' gradient over them: (softmax - one-hot) times `grads`, 0 where there is no target.

    Args:
        logits, targets, ignored: as in `nll_of`.
        totals: [N] fp32, what that returned.
        grads: [N] fp32, of each likelihood.
    """
    assert logits.is_contiguous()
    blocks = triton.cdiv(logits.shape[1], _BLOCK)
    launch: Any = _gradient
    if len(logits):
        launch[(len(logits) * blocks,)](
            logits, targets, totals, grads.contiguous(), ignored, logits.shape[1], _BLOCK, num_warps=_WARPS
        )
