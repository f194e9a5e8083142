"""Attention over packed rows: every document sees itself only.

Registered with Transformers' AttentionInterface under the name `fourfold`, so that any model which takes its
attention from there (`_supports_attention_backend`) runs it. The document boundaries arrive as keyword arguments of
the model's forward. On CUDA in half precision it is torch's variable-length flash kernel; elsewhere one call of
`scaled_dot_product_attention` a document, which costs what the documents cost and not what the row would.

Under context parallelism (parallel/context.py) a rank has a part of each row, padded rows too.

Shape legend: B rows, S positions of a rank, K keys, d head dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AttentionInterface, PreTrainedConfig, PreTrainedModel

from fourfold.dataset.batch import Keys
from fourfold.families.shared_positions import caps_scores, has_fused_scores, position_obstacles
from fourfold.models import document_attention, equal_documents
from fourfold.models.document_attention import Reach
from fourfold.parallel import context
from fourfold.parallel.context import ContextRows, Method, Stretch
from fourfold.parallel.flash import Spans, flash_with_sinks
from fourfold.parallel.ring import ring_attention
from fourfold.parallel.scores import Scores

NAME = "fourfold"
_GROUPED: dict[str, Any] = {"enable_gqa": True} if torch.__version__ >= "2.12" else {}
"""What torch's kernel is told where heads share keys; versions before 2.12 take it without a word."""


def register() -> None:
    """Make `attn_implementation="fourfold"` known to Transformers; calling it again changes nothing.

    No function for its masks is registered: boundaries and causality are known to the kernel, and Transformers makes
    no mask then. With one, it looked for documents in the positions first, and the host waited for the device.
    """
    AttentionInterface.register(NAME, packed_attention)


def context_obstacles(config: PreTrainedConfig, method: Method) -> Iterator[str]:
    """Why the positions of a model's rows cannot be shared by ranks; nothing if they can."""
    yield from position_obstacles(config, MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None))
    if method == "ring" and getattr(config, "attention_dropout", 0.0):
        yield f"the ring has no dropout of attention weights, and attention_dropout is {config.attention_dropout}"


@contextmanager
def attention_for_generation(model: PreTrainedModel) -> Iterator[None]:
    """Within it, a model that runs packed attention has Transformers' own again, which knows caches and masks."""
    if model.config._attn_implementation != NAME:
        yield
        return
    # Transformers 5.17's `sdpa` leaves soft caps out without a word
    model.set_attn_implementation("sdpa" if model._supports_sdpa and not caps_scores(model.config) else "eager")
    try:
        yield
    finally:
        model.set_attn_implementation(NAME)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    lengths: tuple[int, ...] = (),
    cu_seqlens: Tensor | None = None,
    longest: int = 0,
    documents: int = 0,
    reach: Reach | None = None,
    keys: Keys | None = None,
    context_rows: ContextRows | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each document of a row.

    Args:
        module: the attention layer.
        query: [B, heads, S, d]; B = 1 unless `context_rows` are given.
        key, value: [B, KV heads, S, d]; the value's last size may differ.
        attention_mask: unused.
        lengths: length of each document; they sum to S. Unused with `context_rows`.
        cu_seqlens: [D + 1] int32, the same as offsets.
        longest: at least the length of the longest document, for the kernel that takes `cu_seqlens` alone
            (`takes_offsets`); 0 where `lengths` are given.
        documents: how many equally long documents fill the row, if a kernel for such rows is to be tried; 0 otherwise.
        reach: who sees what, if the kernels that need no more are to be tried, with `longest`; None otherwise.
        keys: what documents see, where it is not just themselves.
        context_rows: the whole rows that the S positions are a part of.
        dropout, scaling, sliding_window, softcap: see Scores.
        s_aux: its sinks.
    Returns:
        [B, S, heads, value dim] and None (no weights are kept).
    """
    if torch.is_autocast_enabled(query.device.type):
        # Beside fp32 masters the rotation leaves queries and keys in fp32; every attention kernel would cast them, but
        # the choice of the kernel is made here.
        query, key, value = (t.to(torch.get_autocast_dtype(query.device.type)) for t in (query, key, value))
    scores = Scores(dropout, scaling, sliding_window, softcap, s_aux)
    if context_rows is not None:
        return _Shared.attend(query, key, value, context_rows, scores), None
    key_offsets = cu_seqlens
    if keys is not None:
        key, value = (_Seen.apply(tensor, keys.index, keys.places) for tensor in (key, value))
        key_offsets = keys.offsets
    if documents and sliding_window is None and scores.fused and equal_documents.takes(query, value):
        return equal_documents.equal_documents(query, key, value, documents, scaling), None
    in_window = sliding_window is not None and keys is not None
    if reach is not None and not in_window and document_attention.takes(query, value, scores):
        return document_attention.document_attention(query, key, value, reach, longest, scores), None
    if longest and scores.by_flash:
        assert cu_seqlens is not None
        query, key, value = (t[0].transpose(0, 1) for t in (query, key, value))
        most_keys = longest if keys is None else key.shape[0]
        out = _kernel(query, key, value, cu_seqlens, longest, scores, key_offsets, most_keys, grouped=True)
        return out[None], None
    offsets = None if cu_seqlens is None or key_offsets is None else (cu_seqlens, key_offsets)
    pairs = tuple(zip(lengths, lengths if keys is None else keys.lengths, strict=True))
    return attend(query, key, value, Stretch(((0, key.shape[2]),), (pairs,), offsets), scores), None


class _Seen(torch.autograd.Function):
    """Keys or values document after document; their gradients are read back, where autograd would add into zeros, with
    atomic additions in 16 bits on a GPU."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, index: Tensor, places: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """tensor [B, heads, S, d], index [K], places [2, S] (see `Keys`) -> [B, heads, K, d]."""
        ctx.save_for_backward(places)
        return tensor.index_select(2, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """grad [B, heads, K, d]."""
        own, other = ctx.saved_tensors[0].unbind()
        seen = grad.index_select(2, other.clamp(min=0)) * (other >= 0)[:, None]
        return grad.index_select(2, own) + seen, None, None


def _in_context(query: Tensor, key: Tensor, value: Tensor, rows: ContextRows, scores: Scores) -> Tensor:
    """The same for a rank's part of each row: every rank of its context calls this at the same time."""
    context = rows.context
    if context.method == "ulysses":
        return _ulysses(query, key, value, rows, scores)
    if context.method == "ring":
        return ring_attention(query, key, value, rows, scores).transpose(1, 2)
    key, value = context.gather(key), context.gather(value)
    if (out := _by_reach(query, key, value, rows, scores)) is not None:
        return out
    queries = query.chunk(len(rows.stretches), dim=2)
    return torch.cat(
        [attend(q, key, value, stretch, scores) for q, stretch in zip(queries, rows.stretches, strict=True)], dim=1
    )


class _Shared:
    """Attention over positions that ranks share, as it is called."""

    attend: Any = staticmethod(_in_context)


def keep_from_compiler() -> None:
    """Have a compiler leave attention over positions that ranks share as it is.

    Not from the start, since importing the compiler takes a second.
    """
    reason = "ranks exchange keys, and rows differ from micro-batch to micro-batch"
    _Shared.attend = staticmethod(torch.compiler.disable(_in_context, reason=reason))


def _by_reach(query: Tensor, key: Tensor, value: Tensor, rows: ContextRows, scores: Scores) -> Tensor | None:
    """Queries of one row over all its keys, by the kernels that are told who sees what: [1, S, heads, d]; None where
    they are not for it."""
    takes = document_attention.has_kernel(query.device) and document_attention.takes(query, value, scores)
    if len(rows.documents) > 1 or not takes:
        return None
    reach, plain = rows.reach(scores.sliding_window), replace(scores, sliding_window=None)
    return document_attention.document_attention(query, key, value, reach, rows.longest, plain)


def _ulysses(query: Tensor, key: Tensor, value: Tensor, rows: ContextRows, scores: Scores) -> Tensor:
    """The whole rows with a part of the heads, arXiv:2309.14509."""
    context = rows.context
    kv_heads = key.shape[1]
    # Where there are fewer key heads than ranks, or they do not divide, each is given to several.
    copies = math.lcm(kv_heads, context.size) // kv_heads
    if copies > 1:
        key, value = (t.repeat_interleave(copies, dim=1) for t in (key, value))
    query, key, value = (context.heads_for_positions(t) for t in (query, key, value))
    if scores.sinks is not None:
        scores = replace(scores, sinks=scores.sinks.chunk(context.size)[context.rank])
    out = _by_reach(query, key, value, rows, scores)
    out = attend(query, key, value, rows.whole, scores) if out is None else out
    return context.positions_for_heads(out.transpose(1, 2)).transpose(1, 2)


def attend(query: Tensor, key: Tensor, value: Tensor, stretch: Stretch, scores: Scores) -> Tensor:
    """query [B, heads, S, d], key and value [B, KV heads, K, d] -> [B, S, heads, value dim]."""
    half = context.has_varlen(query.device) and query.dtype in (torch.float16, torch.bfloat16)
    if half and scores.by_flash and scores.dropout == 0.0 and stretch.offsets is not None:
        return _varlen(query, key, value, stretch, scores)
    rows: list[Tensor] = []
    for row, ((start, stop), documents) in enumerate(zip(stretch.keys, stretch.documents, strict=True)):
        num_queries, num_keys = zip(*documents, strict=True)
        # `split`, whose backward pass is one copy; that of a slice fills and adds a tensor of the whole row's size
        pieces = zip(
            query[row : row + 1].split(num_queries, dim=2),
            key[row : row + 1, :, start:stop].split(num_keys, dim=2),
            value[row : row + 1, :, start:stop].split(num_keys, dim=2),
            strict=True,
        )
        rows.append(torch.cat([_document(q, k, v, scores).transpose(1, 2) for q, k, v in pieces], dim=1))
    return torch.cat(rows)


def takes_offsets(config: PreTrainedConfig, device: torch.device, compute: torch.dtype) -> bool:
    """Whether every layer of a model can run a kernel that is told nothing but the documents' offsets.

    Args:
        config: of the text model.
    """
    if not has_fused_scores(config) or compute not in (torch.float16, torch.bfloat16):
        return False
    return knows_caps(config, device) if caps_scores(config) else context.has_varlen(device)


def knows_caps(config: PreTrainedConfig, device: torch.device) -> bool:
    """Whether a device has a kernel for a text model whose scores are soft-capped; others make all its scores."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return document_attention.has_kernel(device) and document_attention.takes_width(width, capped=True)


def _varlen(query: Tensor, key: Tensor, value: Tensor, stretch: Stretch, scores: Scores) -> Tensor:
    assert stretch.offsets is not None

    def end_to_end(tensor: Tensor, ranges: Iterable[tuple[int, int]]) -> Tensor:
        return torch.cat([row[:, a:b].transpose(0, 1) for row, (a, b) in zip(tensor, ranges, strict=True)])

    q = end_to_end(query, [(0, query.shape[2])] * query.shape[0])
    k, v = (end_to_end(t, stretch.keys) for t in (key, value))
    longest = [max(pair[i] for row in stretch.documents for pair in row) for i in range(2)]
    out = _kernel(q, k, v, stretch.offsets[0], longest[0], scores, stretch.offsets[1], longest[1])
    return out.unflatten(0, (query.shape[0], -1))


def _kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    longest: int,
    scores: Scores,
    key_offsets: Tensor | None = None,
    longest_keys: int | None = None,
    *,
    grouped: bool = False,
) -> Tensor:
    """query [T, heads, d], key and value [K, KV heads, d] of documents end to end -> [T, heads, value dim].

    Args:
        offsets: [D + 1] int32, where each document's queries start.
        longest: at least the most queries of a document.
        key_offsets, longest_keys: the same of keys; None where they are the same.
        grouped: leave it to the kernel that several heads share a key.
    """
    from torch.nn.attention.varlen import varlen_attn  # torch >= 2.10

    heads, kv_heads = query.shape[1], key.shape[1]
    asked = dict(_GROUPED) if grouped and kv_heads != heads else {}
    if kv_heads != heads and not grouped:
        key, value = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (key, value))
    window = (-1, 0) if scores.sliding_window is None else (scores.sliding_window - 1, 0)
    width = value.shape[-1]
    if width != query.shape[-1]:  # the kernel has one size of heads (deepseek's values are narrower)
        value = F.pad(value, (0, query.shape[-1] - width))
    key_offsets = offsets if key_offsets is None else key_offsets
    longest_keys = longest if longest_keys is None else longest_keys
    # With fewer queries than keys the kernel lets the last query see the last key, as Stretch has it.
    if scores.sinks is not None:
        spans = Spans((offsets, key_offsets), (longest, longest_keys), window[0], window[1])
        return flash_with_sinks(query, key, value, scores.sinks, spans, scores.scale(query.shape[-1]))[..., :width]
    asked |= {"scale": scores.scaling, "window_size": window}
    out = varlen_attn(query, key, value, offsets, key_offsets, longest, longest_keys, **asked)
    assert isinstance(out, Tensor)
    return out[..., :width]


def _document(query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
    """One document's queries, of which the last sees the last key: [1, heads, N, d] -> [1, heads, N, value dim]."""
    num_queries, window = query.shape[2], scores.sliding_window
    if window is not None and key.shape[2] > num_queries + window - 1:
        key, value = (t[:, :, -(num_queries + window - 1) :] for t in (key, value))
    groups, num_keys = query.shape[1] // key.shape[1], key.shape[2]
    if not scores.fused:
        return _eager(query, key, value, groups, scores)
    square = num_queries == num_keys and (window is None or num_keys <= window)
    mask = None if square else _causal_mask(num_queries, num_keys, window, query.device)
    return F.scaled_dot_product_attention(
        query, key, value, mask, scores.dropout, is_causal=square, scale=scores.scaling, enable_gqa=groups > 1
    )


def _causal_mask(num_queries: int, num_keys: int, sliding_window: int | None, device: torch.device) -> Tensor:
    """[queries, keys] bool, True where the query may see the key; the last query is at the last key's position."""
    positions = torch.arange(num_keys, device=device)
    distance = positions[num_keys - num_queries :, None] - positions[None, :]
    mask = distance >= 0
    return mask if sliding_window is None else mask & (distance < sliding_window)


def _eager(query: Tensor, key: Tensor, value: Tensor, groups: int, settings: Scores) -> Tensor:
    """Attention with soft-capped scores (gemma 2) or sinks (gpt-oss), softmax in fp32."""
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(-1, -2) * settings.scale(query.shape[-1])
    if settings.softcap is not None:
        scores = settings.softcap * torch.tanh(scores / settings.softcap)
    num_queries, num_keys = scores.shape[-2:]
    hidden = ~_causal_mask(num_queries, num_keys, settings.sliding_window, query.device)
    scores = scores.float().masked_fill(hidden, float("-inf"))
    if settings.sinks is not None:
        sinks = settings.sinks.float().reshape(1, -1, 1, 1).expand(query.shape[0], -1, num_queries, 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = scores.softmax(dim=-1)[..., :num_keys]
    weights = F.dropout(weights, settings.dropout, training=settings.dropout > 0)
    return weights.to(value.dtype) @ value
