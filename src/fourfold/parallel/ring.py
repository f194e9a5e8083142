"""Ring attention, arXiv:2310.01889: keys and values travel round the ranks of a context, none holds all of them.

In as many steps as there are ranks each attends to its own keys, then to those of the rank before it, and so on, while
the next ones arrive. A partial result comes with the log-sum-exp of its scores, by which two of them merge:

    L = log(exp(L1) + exp(L2))    O = exp(L1 - L) O1 + exp(L2 - L) O2

The backward pass goes round once more; the gradients of keys and values travel with them and arrive at their owner.

Shape legend: B rows, s positions of this rank, H heads, G key heads, d head dim.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fourfold.parallel.context import ContextParallel, ContextRows
from fourfold.parallel.ring_kernels import FlashKernel, Kernel, PlainKernel
from fourfold.parallel.scores import Scores


def ring_attention(query: Tensor, key: Tensor, value: Tensor, rows: ContextRows, scores: Scores) -> Tensor:
    """Causal attention within each document of the whole rows, over this rank's queries.

    Args:
        query: [B, H, s, d].
        key, value: [B, G, s, d]; the value's last size may differ.
    Returns:
        [B, H, s, value dim].
    """
    assert scores.dropout == 0.0, "a ring has no dropout of attention weights"
    plain = replace(scores, sinks=None)
    return _Ring.apply(query, key, value, scores.sinks, rows, plain)  # type: ignore[return-value]


class _Passing:
    """A tensor on its way to the next rank, and the one on its way from the rank before."""

    def __init__(self, tensor: Tensor, context: ContextParallel) -> None:
        self._sent, self._received = tensor, torch.empty_like(tensor)
        after, before = (
            dist.get_global_rank(context.group, (context.rank + step) % context.size) for step in (1, context.size - 1)
        )
        self._works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, tensor, after, context.group),
                dist.P2POp(dist.irecv, self._received, before, context.group),
            ]
        )

    def arrived(self) -> Tensor:
        """Wait for what comes; what was sent may be written to from now on."""
        for work in self._works:
            work.wait()
        return self._received


def _kernel(query: Tensor, scores: Scores) -> Kernel:
    half = query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)
    # With a window torch 2.11's flash kernel gives zeros for pieces that lie before their queries.
    fused = half and scores.fused and scores.sliding_window is None
    return FlashKernel() if fused else PlainKernel()


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, rows: ContextRows, scores: Scores
    ) -> Tensor:
        context, size = rows.context, rows.context.size
        out = query.new_zeros((*query.shape[:3], value.shape[-1]), dtype=torch.float32)
        lse = torch.full_like(out[..., 0], float("-inf"))
        if sinks is not None:
            # A sink is one more key whose value is zero.
            lse = sinks.float()[None, :, None].expand_as(lse).clone()
        block = torch.cat([key, value], -1).contiguous()
        kernel = _kernel(query, scores)
        for step in range(size):
            passing = _Passing(block, context) if step < size - 1 else None
            keys, values = block.split([key.shape[-1], value.shape[-1]], -1)
            for piece in rows.pieces((context.rank - step) % size, scores.sliding_window):
                q, k = (piece.row, slice(None), slice(*piece.queries)), (piece.row, slice(None), slice(*piece.keys))
                part, part_lse = kernel.forward(query[q], keys[k], values[k], piece, scores)
                both = torch.logaddexp(lse[q], part_lse)
                out[q] = out[q] * (lse[q] - both).exp()[..., None] + part * (part_lse - both).exp()[..., None]
                lse[q] = both
            if passing is not None:
                block = passing.arrived()
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse, sinks)
        ctx.rows, ctx.scores = rows, scores
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value, out, lse, sinks = ctx.saved_tensors
        rows: ContextRows = ctx.rows
        context, size, sizes = rows.context, rows.context.size, [key.shape[-1], value.shape[-1]]
        dq = torch.zeros_like(query, dtype=torch.float32)
        block = torch.cat([key, value], -1).contiguous()
        kernel = _kernel(query, ctx.scores)
        carried: _Passing | None = None
        for step in range(size):
            passing = _Passing(block, context) if step < size - 1 else None
            keys, values = block.split(sizes, -1)
            found = torch.zeros_like(block, dtype=torch.float32)
            dk, dv = found.split(sizes, -1)
            for piece in rows.pieces((context.rank - step) % size, ctx.scores.sliding_window):
                q, k = (piece.row, slice(None), slice(*piece.queries)), (piece.row, slice(None), slice(*piece.keys))
                by_q, by_k, by_v = kernel.backward(
                    grad[q], query[q], keys[k], values[k], out[q], lse[q], piece, ctx.scores
                )
                dq[q] += by_q
                dk[k] += by_k
                dv[k] += by_v
            if carried is not None:
                found += carried.arrived()
            # The rank after this one has these keys next; after the last step that is their owner.
            carried = _Passing(found, context)
            if passing is not None:
                block = passing.arrived()
        assert carried is not None
        dk, dv = carried.arrived().split(sizes, -1)
        d_sinks = None
        if sinks is not None:
            # dS = P * (dP - delta) of a key whose value, and so dP, is zero
            delta = (grad.float() * out.float()).sum(-1)
            d_sinks = -((sinks.float()[None, :, None] - lse).exp() * delta).sum((0, 2)).to(sinks.dtype)
        return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype), d_sinks, None, None
