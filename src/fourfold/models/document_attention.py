"""Attention within the documents of a packed row, by kernels of our own (parallel/document_kernel.py), as operators.

On an H100 they take half the time of PyTorch's kernel for documents of any lengths where documents are short, and two
thirds where they are long. They need nothing of the host but the row's length, so what is compiled or recorded with
them fits all rows as long.

Shape legend: S queries, K keys, H heads, G key heads, d head dim.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fourfold.base.triton import has_triton
from fourfold.dataset.batch import Keys
from fourfold.models.equal_documents import empty_row
from fourfold.parallel.scores import Scores

Reach = tuple[Tensor, Tensor]
"""Who sees what, int32: [2, S], the first and the last key that each query sees; and [2, K], the first query that sees
each key, and the one behind the last."""

_LEAST_MEMORY = 128 * 1024
"""Bytes of a multiprocessor's shared memory that the kernels' loads ahead need room in."""
_WIDTHS = (16, 32, 64, 128)
_WIDEST = 256
_FEW_POSITIONS = 2048
"""Heads of 256 are taken where no other kernel knows what is asked, and in rows with which PyTorch's kernel cannot fill
a card: 0.16 ms for 8 documents of 150 and 0.84, but 6.3 and 4.1 for 2 of 4,096 (H100, forward and backward)."""
MOST_POSITIONS = 2**16
"""Of a row: beyond, a place in it may be too large for the kernels' 32 bits (`takes` knows whether it is)."""
_MOST_PLACES = 2**31


@lru_cache(maxsize=8)  # layers of ranks that share positions ask, each time they run
def has_kernel(device: torch.device) -> bool:
    """Whether a device runs the kernels, and fast: Hopper and what has as much memory beside its multiprocessors."""
    if device.type != "cuda" or not has_triton() or torch.cuda.get_device_capability(device) < (9, 0):
        return False
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin >= _LEAST_MEMORY


def takes_width(width: int, *, capped: bool, positions: int = MOST_POSITIONS) -> bool:
    """Whether heads of a width are for the kernels.

    Args:
        capped: scores are soft-capped, which no other kernel knows.
        positions: of the row.
    """
    return width in _WIDTHS or (width == _WIDEST and (capped or positions <= _FEW_POSITIONS))


def takes(query: Tensor, value: Tensor, scores: Scores) -> bool:
    """Whether the kernels take heads of such widths in such a dtype; queries [..., S, d] and values [..., K, d]."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    heads, positions, width = query.shape[-3:]
    fits = width == value.shape[-1] and takes_width(width, capped=scores.softcap is not None, positions=positions)
    places = max(positions * max(query.stride(-2), heads * width), value.shape[-2] * value.stride(-2))
    return half and fits and places < _MOST_PLACES and scores.dropout == 0.0


def reach_of(offsets: Tensor, positions: int, keys: Keys | None = None) -> Reach:
    """Who sees what in a packed row; its own keys where `keys` are not given.

    Args:
        offsets: [D + 1] int32, where each document's queries start; the last is `positions`.
    """
    key_offsets = offsets if keys is None else keys.offsets
    # a document's last query is at its last key
    shift = key_offsets[1:] - offsets[1:]
    query = torch.arange(positions, device=offsets.device, dtype=torch.int32)
    document = torch.searchsorted(offsets[1:], query, right=True)
    of_queries = torch.stack([key_offsets[document], query + shift[document]])
    if keys is None:
        return of_queries, torch.stack([query, offsets[1:][document]])
    key = torch.arange(len(keys.index), device=offsets.device, dtype=torch.int32)
    document = torch.searchsorted(key_offsets[1:], key, right=True)
    begins = torch.maximum(key - shift[document], offsets[document])
    return of_queries, torch.stack([begins, offsets[1:][document]])


_OPERATORS = torch.library.Library("fourfold", "FRAGMENT")
_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor? sinks"
_SIGHT = "Tensor of_queries, Tensor of_keys, int? window, SymInt longest, float scale, float? cap"
_OPERATORS.define(f"documents({_INPUTS}, {_SIGHT}) -> (Tensor, Tensor)")
_OPERATORS.define(
    f"documents_back(Tensor grad, {_INPUTS}, Tensor out, Tensor sums, {_SIGHT}) -> (Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.impl(_OPERATORS, "documents", "CUDA")
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    of_queries: Tensor,
    of_keys: Tensor,
    window: int | None,
    longest: int,
    scale: float,
    cap: float | None,
) -> tuple[Tensor, Tensor]:
    from fourfold.parallel.document_kernel import Scoring, Sight, forward

    sight = Sight.of(of_queries, of_keys, window, longest)
    out, sums = forward(query[0], key[0], value[0], sight, Scoring(scale, cap, sinks))
    return out.transpose(0, 1)[None], sums


@torch.library.register_fake("fourfold::documents", lib=_OPERATORS)
def _forward_of_fakes(query: Tensor, key: Tensor, value: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return empty_row(query), query.new_empty(query.shape[1:3], dtype=torch.float32)


@torch.library.impl(_OPERATORS, "documents_back", "CUDA")
def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    out: Tensor,
    sums: Tensor,
    of_queries: Tensor,
    of_keys: Tensor,
    window: int | None,
    longest: int,
    scale: float,
    cap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from fourfold.parallel.document_kernel import Scoring, Sight, backward

    sight, scoring = Sight.of(of_queries, of_keys, window, longest), Scoring(scale, cap, sinks)
    own_grad = grad[0] if grad.stride(-1) == 1 else grad[0].contiguous()
    *found, sinks_grad = backward(own_grad, query[0], key[0], value[0], out[0].transpose(0, 1), sums, sight, scoring)
    query_grad, key_grad, value_grad = (each.transpose(0, 1)[None] for each in found)
    return query_grad, key_grad, value_grad, _no_sinks(sums) if sinks_grad is None else sinks_grad


@torch.library.register_fake("fourfold::documents_back", lib=_OPERATORS)
def _backward_of_fakes(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, out: Tensor, sums: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sinks_grad = _no_sinks(sums) if sinks is None else torch.empty_like(sinks, dtype=torch.float32)
    return empty_row(query), empty_row(key), empty_row(value), sinks_grad


def _no_sinks(sums: Tensor) -> Tensor:
    """What stands for their gradient: an operator's results are all tensors."""
    return sums.new_empty(0)


class _Documents(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        of_queries: Tensor,
        of_keys: Tensor,
        window: int | None,
        longest: int,
        scale: float,
        cap: float | None,
    ) -> Tensor:
        sight = (of_queries, of_keys, window, longest, scale, cap)
        out, sums = torch.ops.fourfold.documents(query, key, value, sinks, *sight)
        ctx.save_for_backward(query, key, value, sinks, out, sums, of_queries, of_keys)
        ctx.numbers = (window, longest, scale, cap)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        saved = ctx.saved_tensors  # once: what is computed again is handed out once
        sinks = saved[3]
        *found, by_sinks = torch.ops.fourfold.documents_back(grad, *saved, *ctx.numbers)
        return *found, None if sinks is None else by_sinks.to(sinks.dtype), *(None,) * 6


def document_attention(query: Tensor, key: Tensor, value: Tensor, reach: Reach, longest: int, scores: Scores) -> Tensor:
    """Causal attention within each document of a row.

    Args:
        query: [1, H, S, d] in 16 bits; `takes` says which.
        key, value: [1, G, K, d].
        reach: who sees what.
        longest: at least the length of the longest document, or the row's.
        scores: without dropout; a window only where documents see their own keys.
    Returns:
        [1, S, H, d].
    """
    made = (scores.sliding_window, longest, scores.scale(query.shape[-1]), scores.softcap)
    # no copies: the kernels take queries and keys as they lie, but for a head's numbers, which must be adjacent
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    out = _Documents.apply(query, key, value, scores.sinks, *reach, *made)
    assert isinstance(out, Tensor)
    return out.transpose(1, 2)
