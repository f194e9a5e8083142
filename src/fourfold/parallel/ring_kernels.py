"""Attention between some queries and some keys, with what it takes to merge the results of several such pieces.

Of queries with scores s_j over one piece's keys, a kernel gives the piece's own output and L = log sum_j exp(s_j). With
L over all pieces known, each piece's gradients follow from it alone (arXiv:2307.08691, 3.1.2):

    P = exp(S - L)    dV = P^T dO    dS = P * (dO V^T - rowsum(dO * O))    dQ = dS K    dK = dS^T Q

Shape legend: H heads, G key heads, N queries, M keys, d head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fourfold.parallel import flash
from fourfold.parallel.flash import Spans
from fourfold.parallel.scores import Scores


@dataclass(frozen=True, slots=True)
class Piece:
    """Adjacent queries and adjacent keys of one row that have documents in common.

    Attributes:
        row: of the batch.
        queries: [start, stop) among this rank's positions.
        keys: [start, stop) among those of the rank that the keys come from.
        documents: numbers of queries and keys of each document; they fill the piece.
        distance: how many positions a document's first query is after its first key.
        offsets: the documents' numbers of queries and of keys as offsets, two [D + 1] int32, on a CUDA device only.
    """

    row: int
    queries: tuple[int, int]
    keys: tuple[int, int]
    documents: tuple[tuple[int, int], ...]
    distance: int
    offsets: tuple[Tensor, Tensor] | None = None


class Kernel(Protocol):
    """Computes one piece."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, piece: Piece, scores: Scores) -> tuple[Tensor, Tensor]:
        """q [H, N, d], k and v [G, M, d] -> output [H, N, value dim] and log-sum-exp [H, N], fp32."""
        ...

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, piece: Piece, scores: Scores
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v.

        Args:
            grad, out: [H, N, value dim], of the whole attention.
            lse: [H, N] fp32, over all keys of the whole attention.
        """
        ...


class PlainKernel:
    """By matrix products in fp32; knows everything that Scores can ask but dropout."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, piece: Piece, scores: Scores) -> tuple[Tensor, Tensor]:
        """See Kernel."""
        outs: list[Tensor] = []
        sums: list[Tensor] = []
        sizes = [list(numbers) for numbers in zip(*piece.documents, strict=True)]
        for q_, k_, v_ in zip(q.split(sizes[0], 1), k.split(sizes[1], 1), v.split(sizes[1], 1), strict=True):
            found, _ = _scores(q_.float(), _spread(k_, q_), piece, scores)
            lse = found.logsumexp(-1)
            outs.append((found - lse[..., None]).exp() @ _spread(v_, q_))
            sums.append(lse)
        return torch.cat(outs, 1), torch.cat(sums, 1)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, piece: Piece, scores: Scores
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See Kernel."""
        grad = grad.float()
        delta = (grad * out.float()).sum(-1, keepdim=True)
        num_q, num_k = (list(numbers) for numbers in zip(*piece.documents, strict=True))
        dq: list[Tensor] = []
        dk: list[Tensor] = []
        dv: list[Tensor] = []
        by_query = [t.split(num_q, 1) for t in (q.float(), grad, delta, lse)]
        by_key = [t.split(num_k, 1) for t in (k, v)]
        for q_, grad_, delta_, lse_, k_, v_ in zip(*by_query, *by_key, strict=True):
            keys, values = _spread(k_, q_), _spread(v_, q_)
            found, slope = _scores(q_, keys, piece, scores)
            weights = (found - lse_[..., None]).exp()
            by_score = weights * (grad_ @ values.mT - delta_) * slope * scores.scale(q.shape[-1])
            dq.append(by_score @ keys)
            dk.append(_gather(by_score.mT @ q_, k_))
            dv.append(_gather(weights.mT @ grad_, v_))
        return torch.cat(dq, 1), torch.cat(dk, 1), torch.cat(dv, 1)


def _scores(q: Tensor, k: Tensor, piece: Piece, scores: Scores) -> tuple[Tensor, Tensor | float]:
    """Scores [H, N, M], -inf where a query does not see a key, and their derivative by what the cap is put on."""
    found = q @ k.mT * scores.scale(q.shape[-1])
    slope: Tensor | float = 1.0
    if scores.softcap is not None:
        capped = torch.tanh(found / scores.softcap)
        found, slope = scores.softcap * capped, 1 - capped.square()
    num_q, num_k = found.shape[-2:]
    after = piece.distance + torch.arange(num_q, device=q.device)[:, None] - torch.arange(num_k, device=q.device)
    hidden = after < 0
    if scores.sliding_window is not None:
        hidden = hidden | (after >= scores.sliding_window)
    return found.masked_fill(hidden, float("-inf")), slope


def _spread(by_key_head: Tensor, queries: Tensor) -> Tensor:
    """[G, M, d] -> [H, M, d] fp32."""
    return by_key_head.float().repeat_interleave(queries.shape[0] // by_key_head.shape[0], dim=0)


def _gather(by_head: Tensor, like: Tensor) -> Tensor:
    """The gradient of `_spread`: [H, M, d] -> [G, M, d]."""
    return by_head.unflatten(0, (like.shape[0], -1)).sum(1)


class FlashKernel:
    """By torch's flash attention on CUDA in half precision; knows neither caps nor sinks."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, piece: Piece, scores: Scores) -> tuple[Tensor, Tensor]:
        """See Kernel."""
        spans = self._spans(q, k, piece, scores)
        out, lse = flash.forward(*self._end_to_end(q, k, v), spans, scores.scale(q.shape[-1]))
        return out.transpose(0, 1).float(), lse

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, piece: Piece, scores: Scores
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See Kernel."""
        grad, out = (t.transpose(0, 1).contiguous().to(q.dtype) for t in (grad, out))
        spans, scale = self._spans(q, k, piece, scores), scores.scale(q.shape[-1])
        found = flash.backward(grad, *self._end_to_end(q, k, v), out, lse.contiguous(), spans, scale)
        dq, dk, dv = (t.transpose(0, 1).float() for t in found)
        return dq, _gather(dk, k), _gather(dv, v)

    @staticmethod
    def _end_to_end(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[heads, N, d] -> [N, heads, d], with as many key heads as heads."""
        groups = q.shape[0] // k.shape[0]
        k, v = (t.repeat_interleave(groups, dim=0) for t in (k, v))
        q, k, v = (t.transpose(0, 1).contiguous() for t in (q, k, v))
        return q, k, v

    @staticmethod
    def _spans(q: Tensor, k: Tensor, piece: Piece, scores: Scores) -> Spans:
        """The kernel lines up the last query with the last key; query i sees key j if
        i + M - N - left <= j <= i + M - N + right. Keys of an earlier chunk are all before the queries, so there is no
        limit on the right; on the left, distance + i - j < window gives left = M - N - distance + window - 1, which is
        not negative, since every query of a piece sees the last key.
        """
        assert piece.offsets is not None
        most_queries, most_keys = (max(numbers) for numbers in zip(*piece.documents, strict=True))
        causal = piece.distance == 0
        left = -1
        if scores.sliding_window is not None:
            left = scores.sliding_window - 1 + (0 if causal else k.shape[1] - q.shape[1] - piece.distance)
        return Spans(piece.offsets, (most_queries, most_keys), left, 0 if causal else -1)
