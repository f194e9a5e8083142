"""Torch's flash attention over documents end to end, with the log-sum-exp of its scores, and with sinks.

A sink is one more key whose value is zero. With the log-sum-exp L of the others and the sink s of a head

    L' = log(exp L + exp s)    O' = exp(L - L') O    ds = - sum_i exp(s - L'_i) rowsum(dO'_i * O'_i)

and the kernel's own backward pass, given O' and L' as if they were its own, finds what is left: it makes
P = exp(S - L') and dS = P * (dO' V^T - rowsum(dO' * O')) of them (arXiv:2307.08691, 3.1.2).

Shape legend: T queries, K keys, H heads, G key heads, d head dim.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Spans(NamedTuple):
    """Who sees what; the last query of a document is at its last key.

    Attributes:
        offsets: [D + 1] int32, where each document's queries and its keys start.
        longest: at least the most queries and the most keys of a document.
        left, right: how many keys before and after its own a query sees; -1 for all.
    """

    offsets: tuple[Tensor, Tensor]
    longest: tuple[int, int]
    left: int
    right: int

    @property
    def arguments(self) -> tuple[Any, ...]:
        """As the kernel has them: no dropout, and the flag of causality, which alone means an unlimited left side;
        with a window the two numbers say all."""
        return (*self.offsets, *self.longest, 0.0, self.right == 0 and self.left < 0)

    @property
    def window(self) -> dict[str, int]:
        """The two numbers."""
        return {"window_size_left": self.left, "window_size_right": self.right}


def forward(q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float) -> tuple[Tensor, Tensor]:
    """q [T, H, d], k and v [K, G, d] in 16 bits on CUDA -> output [T, H, d] and log-sum-exp [H, T] fp32."""
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, *spans.arguments, False, scale=scale, **spans.window
    )
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spans: Spans, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; out and lse may be of more keys than these."""
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device), q.new_empty(0)
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, lse, *spans.arguments, *no_dropout, scale=scale, **spans.window
    )
    return dq, dk, dv


class _WithSinks(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor,
        offsets: Tensor,
        key_offsets: Tensor,
        limits: tuple[int, int, int, int],
        scale: float,
    ) -> Tensor:
        longest, longest_keys, left, right = limits
        spans = Spans((offsets, key_offsets), (longest, longest_keys), left, right)
        out, lse = forward(q, k, v, spans, scale)
        both = torch.logaddexp(lse, sinks.float()[:, None])
        out = (out * (lse - both).exp().T[..., None]).to(q.dtype)
        ctx.save_for_backward(q, k, v, out, both, sinks, offsets, key_offsets)
        ctx.limits, ctx.scale = limits, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, out, lse, sinks, *offsets = ctx.saved_tensors
        longest, longest_keys, left, right = ctx.limits
        spans = Spans((offsets[0], offsets[1]), (longest, longest_keys), left, right)
        grad = grad.contiguous()
        found = backward(grad, q, k, v, out, lse, spans, ctx.scale)
        by_sinks = None
        if ctx.needs_input_grad[3]:
            delta = (grad.float() * out.float()).sum(-1).T
            by_sinks = -((sinks.float()[:, None] - lse).exp() * delta).sum(1).to(sinks.dtype)
        return *found, by_sinks, None, None, None, None


def flash_with_sinks(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, spans: Spans, scale: float) -> Tensor:
    """Attention of documents end to end, each head with one more score.

    Args:
        q: [T, H, d] in 16 bits, on CUDA.
        k, v: [K, G, d].
        sinks: [H].
    Returns:
        [T, H, d].
    """
    limits = (*spans.longest, spans.left, spans.right)
    out = _WithSinks.apply(q, k, v, sinks, *spans.offsets, limits, scale)
    assert isinstance(out, Tensor)
    return out
