"""Sinks by what is done to flash attention's result; plain products in the kernel's place."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from fourfold.models import attention
from fourfold.parallel import flash
from fourfold.parallel.flash import Spans, flash_with_sinks
from fourfold.parallel.ring_kernels import Piece, PlainKernel
from fourfold.parallel.scores import Scores

_LENGTHS = (5, 1, 9)


def _heads_first(*tensors: Tensor) -> Iterator[Tensor]:
    return (tensor.transpose(0, 1) for tensor in tensors)


def _piece(spans: Spans) -> Piece:
    queries, keys = (tuple(offsets.diff().tolist()) for offsets in spans.offsets)
    return Piece(0, (0, sum(queries)), (0, sum(keys)), tuple(zip(queries, keys, strict=True)), 0)


def _scores(spans: Spans, scale: float) -> Scores:
    return Scores(scaling=scale, sliding_window=None if spans.left < 0 else spans.left + 1)


@pytest.fixture
def by_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain products in place of the kernel, which is for GPUs."""

    def forward(q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float) -> tuple[Tensor, Tensor]:
        out, lse = PlainKernel().forward(*_heads_first(q, k, v), _piece(spans), _scores(spans, scale))
        return out.transpose(0, 1), lse

    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spans: Spans, scale: float
    ) -> tuple[Tensor, ...]:
        grad, q, k, v, out = _heads_first(grad, q, k, v, out)
        found = PlainKernel().backward(grad, q, k, v, out, lse, _piece(spans), _scores(spans, scale))
        return tuple(_heads_first(*found))

    monkeypatch.setattr(flash, "forward", forward)
    monkeypatch.setattr(flash, "backward", backward)


@pytest.mark.usefixtures("by_products")
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("trained", [True, False])
def test_sinks_give_what_one_more_column_of_scores_gives(window: int | None, trained: bool) -> None:
    torch.manual_seed(0)
    shapes = [(1, heads, sum(_LENGTHS), 8) for heads in (4, 2, 2)]
    inputs = [torch.randn(shape, dtype=torch.float64).float().requires_grad_() for shape in shapes]
    sinks = torch.tensor([0.5, -2.0, 3.0, 0.0], requires_grad=trained)
    expected, _ = attention.packed_attention(
        nn.Identity(), *inputs, None, lengths=_LENGTHS, s_aux=sinks, sliding_window=window, scaling=0.3
    )
    grad = torch.randn_like(expected)
    leaves = [*inputs, sinks] if trained else inputs
    wanted = torch.autograd.grad(expected, leaves, grad)
    offsets = torch.tensor((0, *_LENGTHS)).cumsum(0).int()
    spans = Spans((offsets, offsets), (9, 9), -1 if window is None else window - 1, 0)
    out = flash_with_sinks(*_heads_first(*(tensor[0] for tensor in inputs)), sinks, spans, 0.3)[None]
    torch.testing.assert_close(out, expected)
    for found, each in zip(torch.autograd.grad(out, leaves, grad), wanted, strict=True):
        torch.testing.assert_close(found, each, rtol=1e-5, atol=1e-6)
