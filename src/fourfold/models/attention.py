"""Attention over packed rows: every document sees itself only.

Registered with Transformers' AttentionInterface under the name `fourfold`, so that any model which takes its
attention from there (`_supports_attention_backend`) runs it. The document boundaries arrive as keyword arguments of
the model's forward. On CUDA in half precision it is torch's variable-length flash kernel; elsewhere one call of
`scaled_dot_product_attention` a document, which costs what the documents cost and not what the row would.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

NAME = "fourfold"


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The mask function of this attention: boundaries and causality are known to the kernel."""


def register() -> None:
    """Make `attn_implementation="fourfold"` known to Transformers; calling it again changes nothing."""
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, _no_mask)


def caps_scores(config: PreTrainedConfig) -> bool:
    """Whether attention scores are soft-capped (gemma 2); Transformers 5.17's `sdpa` leaves that out without a word."""
    return bool(getattr(config, "attn_logit_softcapping", None))


@contextmanager
def attention_for_generation(model: PreTrainedModel) -> Iterator[None]:
    """Within it, a model that runs packed attention has Transformers' own again, which knows caches and masks."""
    if model.config._attn_implementation != NAME:
        yield
        return
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
    lengths: tuple[int, ...],
    cu_seqlens: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each document of a packed row.

    Args:
        module: the attention layer.
        query: [1, heads, S, head dim].
        key, value: [1, KV heads, S, head dim]; the value's last size may differ.
        attention_mask: unused.
        lengths: length of each document; they sum to S.
        cu_seqlens: [D + 1] int32, the same as offsets.
        dropout: probability, training only.
        scaling: factor on the scores; None for head_dim ** -0.5.
        sliding_window: how many positions a query sees, itself included; None for all.
        softcap: scores become softcap * tanh(scores / softcap).
        s_aux: [heads] attention sinks, one extra logit a head (gpt-oss).
    Returns:
        [1, S, heads, value dim] and None (no weights are kept).
    """
    if torch.is_autocast_enabled(query.device.type):
        # Beside fp32 masters the rotation leaves queries and keys in fp32; every attention kernel would cast them, but
        # the choice of the kernel is made here.
        query, key, value = (t.to(torch.get_autocast_dtype(query.device.type)) for t in (query, key, value))
    plain = softcap is None and s_aux is None and dropout == 0.0
    if plain and query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and cu_seqlens is not None:
        return _varlen(query, key, value, cu_seqlens, max(lengths), scaling, sliding_window), None
    groups = query.shape[1] // key.shape[1]
    pieces: list[Tensor] = []
    # `split`, whose backward pass is one copy; that of a slice fills and adds a tensor of the whole row's size
    documents = zip(lengths, *(t.split(lengths, dim=2) for t in (query, key, value)), strict=True)
    for length, q, k, v in documents:
        if softcap is None and s_aux is None:
            windowed = sliding_window is not None and length > sliding_window
            mask = _causal_mask(length, sliding_window, q.device) if windowed else None
            out = F.scaled_dot_product_attention(
                q, k, v, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=groups > 1
            )
        else:
            out = _eager(q, k, v, groups, dropout, scaling, sliding_window, softcap, s_aux)
        pieces.append(out.transpose(1, 2))
    return torch.cat(pieces, dim=1), None


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # torch >= 2.10

    heads, kv_heads = query.shape[1], key.shape[1]
    if kv_heads != heads:
        key, value = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (key, value))
    q, k, v = (t[0].transpose(0, 1).contiguous() for t in (query, key, value))
    window = (-1, 0) if sliding_window is None else (sliding_window - 1, 0)
    out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale=scaling, window_size=window)
    assert isinstance(out, Tensor)
    return out[None]


def _causal_mask(length: int, sliding_window: int | None, device: torch.device) -> Tensor:
    """[length, length] bool, True where the query (row) may see the key (column)."""
    positions = torch.arange(length, device=device)
    distance = positions[:, None] - positions[None, :]
    mask = distance >= 0
    return mask if sliding_window is None else mask & (distance < sliding_window)


def _eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    groups: int,
    dropout: float,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """Attention with soft-capped scores (gemma 2) or sinks (gpt-oss), softmax in fp32."""
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query @ key.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    length = query.shape[2]
    hidden = ~_causal_mask(length, sliding_window, query.device)
    scores = scores.float().masked_fill(hidden, float("-inf"))
    if s_aux is not None:
        sinks = s_aux.float().reshape(1, -1, 1, 1).expand(query.shape[0], -1, length, 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = scores.softmax(dim=-1)[..., :length]
    weights = F.dropout(weights, dropout, training=dropout > 0)
    return weights.to(value.dtype) @ value
