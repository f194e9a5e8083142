"""Triton kernels of causal attention within the documents of a packed row.

PyTorch's kernel for documents of any lengths starts a block for each 128 positions that any document might have, for
each document, repeats its work for each of the heads that share a key, and adds their gradients up afterwards. Here the
blocks are those of the row: one of queries goes through the keys from where its first position's document begins to
itself, one of keys through the queries up to where its last position is seen no more, for all heads that share it. So
the work depends on what the documents have, and nobody needs to know how long the longest is.

    S = scale Q K^T    P = exp(S - L)    L = log sum exp S    dV = P^T dO    D = rowsum(dO * O)
    dS = P * (dO V^T - D)    dQ = scale dS K    dK = scale dS^T Q                      (arXiv:2307.08691)

A soft cap makes c tanh(S / c) of the scores, so that dS gets a factor 1 - tanh(S / c)^2. A sink is one more score of a
head, to which no value belongs: the sums begin with it, and its gradient is - sum_i exp(sink - L_i) D_i.

Nothing is added up in an order that may change, so equal inputs give equal numbers.

Which keys a query sees is told by position, so that documents may see keys that others see as well (prompts that two
answers share): query i those from first[i] to own[i], and key j is seen by the queries from begins[j] to ends[j] - 1.
None of the four ever falls along a row.

Imported only where it runs: on CUDA, where PyTorch brings Triton along.

Shape legend: S queries, K keys, H heads, G key heads, d head dim.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

_HIDDEN = tl.constexpr(-1.0e6)
"""Score of a key that is not seen, in base 2: less than any other, and no infinity, whose differences are no numbers.
Where all keys of a block are hidden from a query, what it adds up is forgotten at the first one that it sees."""
_LOG2_E = tl.constexpr(1.4426950408889634)
_NO_WINDOW = tl.constexpr(2**30)
"""More than there are positions."""
_ROWS = 32
"""Positions of a program that sums rows up."""
_LENGTHS = ["num_queries", "num_keys", "window"]
"""Numbers that differ from row to row: one kernel is compiled for all of them."""


class Blocks(NamedTuple):
    """How many queries and keys a program takes at a time."""

    queries: int
    keys: int


class Cut(NamedTuple):
    """How kernels cut their work.

    Attributes:
        forward, of_keys, of_queries: the blocks of the forward pass, and of the gradients of keys and of queries.
        stages: what is loaded ahead, in the forward and in the backward pass.
    """

    forward: Blocks
    of_keys: Blocks
    of_queries: Blocks
    stages: tuple[int, int]


SHORT = Cut(Blocks(64, 32), Blocks(32, 64), Blocks(64, 32), (3, 3))
LONG = Cut(Blocks(64, 64), Blocks(64, 64), Blocks(64, 64), (3, 2))
"""Up to some thousand tokens a document, and beyond: the fastest of 9 and of 16 ways on an H100 (docs/lab-notes.md)."""
_LONG_FROM = 4096
WIDE = Cut(Blocks(64, 32), Blocks(32, 32), Blocks(64, 32), (2, 1))
"""For heads of 256, of which a multiprocessor has room for fewer: the fastest of 6 ways on an H100."""
_WIDE_FROM = 256
_WARPS = 4


@triton.jit
def _first(firsts, own, at, mask, window):
    """The first key that each query sees; a number past all keys where there is no query."""
    return tl.maximum(tl.load(firsts + at, mask=mask, other=_NO_WINDOW), own - window + 1)


@triton.jit
def _inner_scale(scale, cap, capped: tl.constexpr):
    """The factor on products of queries and keys before `_score`."""
    if capped:
        factor = scale / cap
    else:
        factor = scale * _LOG2_E
    return factor


@triton.jit
def _score(product, factor, cap, capped: tl.constexpr):
    """Scores in base 2."""
    score = product * factor
    if capped:
        score = (cap * _LOG2_E) * (1.0 - 2.0 / (tl.exp2(score * (2.0 * _LOG2_E)) + 1.0))  # cap tanh(score)
    return score


@triton.jit
def _slope(score, cap):
    """By how much a capped score, in base 2, grows with what was capped."""
    share = score / (cap * _LOG2_E)
    return 1.0 - share * share


@triton.jit
def _stretches(firsts, owns, begin, num_queries, window, queries: tl.constexpr, keys: tl.constexpr):
    """Where the keys start that some of a block's queries see, those that all see, those that not all see, and end."""
    end = tl.minimum(begin + queries, num_queries) - 1
    lowest, highest = tl.load(owns + begin), tl.load(owns + end)
    start = tl.maximum(tl.load(firsts + begin), lowest - window + 1) // keys * keys
    latest = tl.maximum(tl.load(firsts + end), highest - window + 1)
    own = lowest // keys * keys
    whole = tl.maximum(tl.minimum(tl.cdiv(latest, keys) * keys, own), start)
    return start, whole, tl.maximum(own, whole), highest + 1


@triton.jit
def _through_keys(  # no annotations but constexpr: the compiler reads them
    out, total, most, query, k, v, k_row, v_row, start, stop, first, own, num_keys, factor, cap,
    keys: tl.constexpr, width: tl.constexpr, capped: tl.constexpr, masked: tl.constexpr,
):  # fmt: skip
    """Go on with a block of queries through the keys from `start` to `stop`."""
    across = tl.arange(0, width)
    for begin in range(start, stop, keys):
        key_at = begin + tl.arange(0, keys)
        is_there = key_at < num_keys
        key = tl.load(k + key_at[None, :] * k_row + across[:, None], mask=is_there[None, :], other=0.0)
        score = _score(tl.dot(query, key), factor, cap, capped)
        if masked:
            seen = (key_at[None, :] >= first[:, None]) & (key_at[None, :] <= own[:, None])
            score = tl.where(seen, score, _HIDDEN)
        now = tl.maximum(most, tl.max(score, 1))
        shrunk = tl.exp2(most - now)
        p = tl.exp2(score - now[:, None])
        value = tl.load(v + key_at[:, None] * v_row + across[None, :], mask=is_there[:, None], other=0.0)
        total = total * shrunk + tl.sum(p, 1)
        out = tl.dot(p.to(value.dtype), value, out * shrunk[:, None])
        most = now
    return out, total, most


@triton.jit(do_not_specialize=_LENGTHS)
def _forward(  # no annotations but constexpr: the compiler reads them
    q, k, v, sinks, firsts, owns, result, sums, num_queries, num_keys, window, scale, cap,
    q_row, q_head, k_row, k_head, v_row, v_head,
    heads: tl.constexpr, group: tl.constexpr, width: tl.constexpr, queries: tl.constexpr, keys: tl.constexpr,
    capped: tl.constexpr, sinking: tl.constexpr,
):  # fmt: skip
    block, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)  # the last ones have most to do
    begin = block * queries
    at, across = begin + tl.arange(0, queries), tl.arange(0, width)
    is_there = at < num_queries
    own = tl.load(owns + at, mask=is_there, other=-1)
    first = _first(firsts, own, at, is_there, window)
    query = tl.load(q + head * q_head + at[:, None] * q_row + across[None, :], mask=is_there[:, None], other=0.0)
    k += (head // group) * k_head
    v += (head // group) * v_head
    if sinking:
        most = tl.zeros((queries,), tl.float32) + tl.load(sinks + head).to(tl.float32) * _LOG2_E
        total = tl.full((queries,), 1.0, tl.float32)
    else:
        most = tl.full((queries,), float("-inf"), tl.float32)
        total = tl.zeros((queries,), tl.float32)
    out = tl.zeros((queries, width), tl.float32)
    start, whole, plain, stop = _stretches(firsts, owns, begin, num_queries, window, queries, keys)
    factor = _inner_scale(scale, cap, capped)
    out, total, most = _through_keys(
        out, total, most, query, k, v, k_row, v_row,
        start, whole, first, own, num_keys, factor, cap, keys, width, capped, True,
    )  # fmt: skip
    out, total, most = _through_keys(
        out, total, most, query, k, v, k_row, v_row,
        whole, plain, first, own, num_keys, factor, cap, keys, width, capped, False,
    )  # fmt: skip
    out, total, most = _through_keys(
        out, total, most, query, k, v, k_row, v_row,
        plain, stop, first, own, num_keys, factor, cap, keys, width, capped, True,
    )  # fmt: skip
    out = out / total[:, None]
    place = result + (at[:, None] * heads + head) * width + across[None, :]
    tl.store(place, out.to(result.dtype.element_ty), mask=is_there[:, None])
    tl.store(sums + head * num_queries + at, most + tl.log2(total), mask=is_there)  # in base 2


@triton.jit(do_not_specialize=_LENGTHS[:1])
def _row_sums(
    grad, out, found, num_queries, g_row, g_head, heads: tl.constexpr, width: tl.constexpr, rows: tl.constexpr
):
    at, head, across = tl.program_id(0) * rows + tl.arange(0, rows), tl.program_id(1), tl.arange(0, width)
    is_there = at < num_queries
    there = is_there[:, None]
    g = tl.load(grad + head * g_head + at[:, None] * g_row + across[None, :], mask=there, other=0.0)
    o = tl.load(out + (at[:, None] * heads + head) * width + across[None, :], mask=there, other=0.0)
    tl.store(found + head * num_queries + at, tl.sum(g.to(tl.float32) * o.to(tl.float32), 1), mask=is_there)


@triton.jit
def _keys_through_queries(
    dk, dv, key, value, q, grad, sums, deltas, q_row, g_row, start, stop, begins, ends, num_queries, factor, cap,
    queries: tl.constexpr, width: tl.constexpr, capped: tl.constexpr,
):  # fmt: skip
    across = tl.arange(0, width)
    for begin in range(start, stop, queries):
        at = begin + tl.arange(0, queries)
        is_there = at < num_queries
        query = tl.load(q + at[None, :] * q_row + across[:, None], mask=is_there[None, :], other=0.0)
        lse = tl.load(sums + at, mask=is_there, other=float("inf"))
        score = _score(tl.dot(key, query), factor, cap, capped)  # [keys, queries]
        p = tl.exp2(score - lse[None, :])
        p = tl.where((at[None, :] >= begins[:, None]) & (at[None, :] < ends[:, None]), p, 0.0)
        g = tl.load(grad + at[:, None] * g_row + across[None, :], mask=is_there[:, None], other=0.0)
        dv = tl.dot(p.to(g.dtype), g, dv)
        delta = tl.load(deltas + at, mask=is_there, other=0.0)
        ds = p * (tl.dot(value, tl.trans(g)) - delta[None, :])
        if capped:
            ds *= _slope(score, cap)
        dk = tl.dot(ds.to(query.dtype), tl.trans(query), dk)
    return dk, dv


@triton.jit
def _queries_through_keys(
    dq, query, g, lse, delta, k, v, k_row, v_row, start, stop, first, own, num_keys, factor, cap,
    keys: tl.constexpr, width: tl.constexpr, capped: tl.constexpr, masked: tl.constexpr,
):  # fmt: skip
    across = tl.arange(0, width)
    for begin in range(start, stop, keys):
        key_at = begin + tl.arange(0, keys)
        is_there = key_at < num_keys
        key = tl.load(k + key_at[None, :] * k_row + across[:, None], mask=is_there[None, :], other=0.0)
        score = _score(tl.dot(query, key), factor, cap, capped)
        p = tl.exp2(score - lse[:, None])
        if masked:
            p = tl.where((key_at[None, :] >= first[:, None]) & (key_at[None, :] <= own[:, None]), p, 0.0)
        value = tl.load(v + key_at[None, :] * v_row + across[:, None], mask=is_there[None, :], other=0.0)
        ds = p * (tl.dot(g, value) - delta[:, None])
        if capped:
            ds *= _slope(score, cap)
        dq = tl.dot(ds.to(key.dtype), tl.trans(key), dq)
    return dq


@triton.jit
def _of_keys(  # no annotations but constexpr: the compiler reads them
    block, head, q, k, v, grad, sums, deltas, begins, ends, dk, dv, num_queries, num_keys, window, scale, cap,
    q_row, q_head, k_row, k_head, v_row, v_head, g_row, g_head,
    heads: tl.constexpr, group: tl.constexpr, width: tl.constexpr, queries: tl.constexpr, keys: tl.constexpr,
    capped: tl.constexpr,
):  # fmt: skip
    """The gradients of a block of keys and values, for all heads that share them."""
    begin, across = block * keys, tl.arange(0, width)
    at = begin + tl.arange(0, keys)
    is_there = at < num_keys
    there = is_there[:, None]
    key = tl.load(k + head * k_head + at[:, None] * k_row + across[None, :], mask=there, other=0.0)
    value = tl.load(v + head * v_head + at[:, None] * v_row + across[None, :], mask=there, other=0.0)
    seen_from = tl.load(begins + at, mask=is_there, other=_NO_WINDOW)
    seen_to = tl.minimum(tl.load(ends + at, mask=is_there, other=0), seen_from + window)
    key_grad, value_grad = tl.zeros((keys, width), tl.float32), tl.zeros((keys, width), tl.float32)
    end = tl.minimum(begin + keys, num_keys) - 1
    start = tl.load(begins + begin) // queries * queries
    stop = tl.minimum(tl.load(ends + end), tl.load(begins + end) + window)
    factor = _inner_scale(scale, cap, capped)
    for member in range(group):
        own = head * group + member
        q_own, g_own = q + own * q_head, grad + own * g_head
        s_own, d_own = sums + own * num_queries, deltas + own * num_queries
        key_grad, value_grad = _keys_through_queries(
            key_grad, value_grad, key, value, q_own, g_own, s_own, d_own, q_row, g_row,
            start, stop, seen_from, seen_to, num_queries, factor, cap, queries, width, capped,
        )  # fmt: skip
    key_heads: tl.constexpr = heads // group
    place = (at[:, None] * key_heads + head) * width + across[None, :]
    tl.store(dk + place, (key_grad * scale).to(dk.dtype.element_ty), mask=there)
    tl.store(dv + place, value_grad.to(dv.dtype.element_ty), mask=there)


@triton.jit
def _of_queries(  # no annotations but constexpr: the compiler reads them
    block, head, q, k, v, grad, sums, deltas, firsts, owns, dq, num_queries, num_keys, window, scale, cap,
    q_row, q_head, k_row, k_head, v_row, v_head, g_row, g_head,
    heads: tl.constexpr, group: tl.constexpr, width: tl.constexpr, queries: tl.constexpr, keys: tl.constexpr,
    capped: tl.constexpr,
):  # fmt: skip
    """The gradient of a block of queries of one head."""
    begin, across = block * queries, tl.arange(0, width)
    at = begin + tl.arange(0, queries)
    is_there = at < num_queries
    there = is_there[:, None]
    query = tl.load(q + head * q_head + at[:, None] * q_row + across[None, :], mask=there, other=0.0)
    g = tl.load(grad + head * g_head + at[:, None] * g_row + across[None, :], mask=there, other=0.0)
    lse = tl.load(sums + head * num_queries + at, mask=is_there, other=float("inf"))
    delta = tl.load(deltas + head * num_queries + at, mask=is_there, other=0.0)
    own = tl.load(owns + at, mask=is_there, other=-1)
    first = _first(firsts, own, at, is_there, window)
    k += (head // group) * k_head
    v += (head // group) * v_head
    query_grad = tl.zeros((queries, width), tl.float32)
    start, whole, plain, stop = _stretches(firsts, owns, begin, num_queries, window, queries, keys)
    factor = _inner_scale(scale, cap, capped)
    query_grad = _queries_through_keys(
        query_grad, query, g, lse, delta, k, v, k_row, v_row,
        start, whole, first, own, num_keys, factor, cap, keys, width, capped, True,
    )  # fmt: skip
    query_grad = _queries_through_keys(
        query_grad, query, g, lse, delta, k, v, k_row, v_row,
        whole, plain, first, own, num_keys, factor, cap, keys, width, capped, False,
    )  # fmt: skip
    query_grad = _queries_through_keys(
        query_grad, query, g, lse, delta, k, v, k_row, v_row,
        plain, stop, first, own, num_keys, factor, cap, keys, width, capped, True,
    )  # fmt: skip
    place = (at[:, None] * heads + head) * width + across[None, :]
    tl.store(dq + place, (query_grad * scale).to(dq.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=_LENGTHS)
def _backward(  # no annotations but constexpr: the compiler reads them
    q, k, v, grad, sums, deltas, firsts, owns, begins, ends, dq, dk, dv, num_queries, num_keys, window, scale, cap,
    q_row, q_head, k_row, k_head, v_row, v_head, g_row, g_head,
    heads: tl.constexpr, group: tl.constexpr, width: tl.constexpr,
    queries_of_keys: tl.constexpr, keys_of_keys: tl.constexpr,
    queries_of_queries: tl.constexpr, keys_of_queries: tl.constexpr, capped: tl.constexpr,
):  # fmt: skip
    """Programs of blocks of keys, and of blocks of queries of a head behind them."""
    key_heads: tl.constexpr = heads // group
    program, of_keys = tl.program_id(0), tl.cdiv(num_keys, keys_of_keys) * key_heads
    if program < of_keys:
        _of_keys(
            program // key_heads, program % key_heads,
            q, k, v, grad, sums, deltas, begins, ends, dk, dv, num_queries, num_keys, window, scale, cap,
            q_row, q_head, k_row, k_head, v_row, v_head, g_row, g_head,
            heads, group, width, queries_of_keys, keys_of_keys, capped,
        )  # fmt: skip
    else:
        program -= of_keys
        _of_queries(
            tl.cdiv(num_queries, queries_of_queries) - 1 - program // heads, program % heads,
            q, k, v, grad, sums, deltas, firsts, owns, dq, num_queries, num_keys, window, scale, cap,
            q_row, q_head, k_row, k_head, v_row, v_head, g_row, g_head,
            heads, group, width, queries_of_queries, keys_of_queries, capped,
        )  # fmt: skip


class Sight(NamedTuple):
    """Who sees what, int32.

    Attributes:
        first, own: [S], the first and the last key that a query sees.
        begins, ends: [K], the first query that sees a key, and the one behind the last.
        window: how many keys a query sees at most, if own and begins are one to one; None for all.
        longest: at least the length of the longest document, or the row's.
    """

    first: Tensor
    own: Tensor
    begins: Tensor
    ends: Tensor
    window: int | None
    longest: int

    @classmethod
    def of(cls, of_queries: Tensor, of_keys: Tensor, window: int | None, longest: int) -> Sight:
        """The same, given first and last of each query, [2, S], and of each key, [2, K]."""
        return cls(of_queries[0], of_queries[1], of_keys[0], of_keys[1], window, longest)

    def cut(self, width: int) -> Cut:
        """How the work is best cut for heads of a width."""
        if width >= _WIDE_FROM:
            return WIDE
        return LONG if self.longest > _LONG_FROM else SHORT


class Scoring(NamedTuple):
    """How scores are made.

    Attributes:
        scale: factor on products of queries and keys.
        cap: scores become cap * tanh(scores / cap).
        sinks: [H] one more score of each head.
    """

    scale: float
    cap: float | None = None
    sinks: Tensor | None = None


def forward(
    q: Tensor, k: Tensor, v: Tensor, sight: Sight, scoring: Scoring, cut: Cut | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of a packed row.

    Args:
        q: [H, S, d] in 16 bits, the last dim adjacent; d is a power of two and at least 16.
        k, v: [G, K, d].
        cut: by default that of `sight`.
    Returns:
        [S, H, d], and log sum exp of the scores in base 2, [H, S] fp32.
    """
    cut = cut or sight.cut(q.shape[-1])
    heads, length, width = q.shape
    out, sums = q.new_empty(length, heads, width), q.new_empty(heads, length, dtype=torch.float32)
    run_forward: Any = _forward
    sinks = sums if scoring.sinks is None else scoring.sinks
    run_forward[(triton.cdiv(length, cut.forward.queries), heads)](
        q, k, v, sinks, sight.first, sight.own, out, sums, length, k.shape[1], sight.window or _NO_WINDOW.value,
        scoring.scale, scoring.cap or 0.0, *_strides(q), *_strides(k), *_strides(v),
        heads, heads // k.shape[0], width, *cut.forward, scoring.cap is not None, scoring.sinks is not None,
        num_warps=_WARPS, num_stages=cut.stages[0],
    )  # fmt: skip
    return out, sums


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    sums: Tensor,
    sight: Sight,
    scoring: Scoring,
    cut: Cut | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of q, k and v, [S, H, d] and [K, G, d], and of the sinks, [H] fp32, None where there are none.

    Args:
        grad: [H, S, d], of the result.
        q, k, v, sight, scoring, cut: as in `forward`.
        out, sums: what that returned.
    """
    cut = cut or sight.cut(q.shape[-1])
    (heads, length, width), (key_heads, num_keys, _) = q.shape, k.shape
    deltas = torch.empty_like(sums)
    run_row_sums: Any = _row_sums
    run_row_sums[(triton.cdiv(length, _ROWS), heads)](grad, out, deltas, length, *_strides(grad), heads, width, _ROWS)
    dq = q.new_empty(length, heads, width)
    dk, dv = (k.new_empty(num_keys, key_heads, width) for _ in range(2))
    blocks = triton.cdiv(num_keys, cut.of_keys.keys) * key_heads, triton.cdiv(length, cut.of_queries.queries) * heads
    run_backward: Any = _backward
    run_backward[(sum(blocks),)](
        q, k, v, grad, sums, deltas, sight.first, sight.own, sight.begins, sight.ends, dq, dk, dv,
        length, num_keys, sight.window or _NO_WINDOW.value, scoring.scale, scoring.cap or 0.0,
        *_strides(q), *_strides(k), *_strides(v), *_strides(grad),
        heads, heads // key_heads, width, *cut.of_keys, *cut.of_queries, scoring.cap is not None,
        num_warps=_WARPS, num_stages=cut.stages[1],
    )  # fmt: skip
    d_sinks = None
    if scoring.sinks is not None:
        shares = torch.exp2(scoring.sinks.float()[:, None] * _LOG2_E.value - sums)
        d_sinks = -(shares * deltas).sum(1)
    return dq, dk, dv, d_sinks


def _strides(tensor: Tensor) -> tuple[int, int]:
    """From one position to the next, and from one head to the next; of [heads, positions, d]."""
    return tensor.stride(1), tensor.stride(0)
