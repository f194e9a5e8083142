"""Keys and values of the rows that are being answered, and the attention that reads them.

The attention is registered with Transformers' AttentionInterface and takes the place of the one that the model is
trained with while answers are generated. It keeps what it is given - rotated keys, and values - by layer, so no
family's idea of a cache matters: sliding windows, soft-capped scores, sinks and narrower values arrive as arguments.

Prompts come end to end in one row [1, S] without padding between them; a later step is a row of one position for each
answer. Either may be filled up at its end.

Shape legend: R slots, C positions of a slot, N rows, S positions of a forward pass, K keys, d head dim, G query heads
that share a key head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from fourfold.families.shared_positions import is_exchangeable
from fourfold.models.attention import attend
from fourfold.parallel.context import Stretch
from fourfold.parallel.scores import Scores

NAME = "fourfold_rollout"
"""Transformers makes no masks for it, since no mask function has this name."""

_KINDS = {"full_attention", "sliding_attention"}


class Slots:
    """Room for keys and values, R rows of C positions in each layer; made when a layer first has some."""

    def __init__(self, num_rows: int, capacity: int) -> None:
        self.num_rows, self.capacity = num_rows, capacity
        self._layers: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def of(self, layer: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values of a layer, [R, KV heads, C, d] each; `key` and `value` [1, KV heads, S, d] are alike."""
        if layer not in self._layers:
            # what was never written is masked, but 0 times a NaN is one
            found = (t.new_zeros(self.num_rows, t.shape[1], self.capacity, t.shape[3]) for t in (key, value))
            self._layers[layer] = (next(found), next(found))
        return self._layers[layer]

    def move(self, sources: Tensor, targets: Tensor, length: int) -> None:
        """Copy the first `length` positions of some slots into others; none of them is both."""
        for pair in self._layers.values():
            for held in pair:
                held[targets, :, :length] = held[sources, :, :length]


class Positions(Protocol):
    """What a forward pass's positions are: writes their keys and values, and attends."""

    def attend(self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        """query [1, heads, S, d], key and value [1, KV heads, S, d] -> [1, S, heads, value dim]."""
        ...


class PromptPositions:
    """Whole prompts, end to end.

    Args:
        slots: where their keys and values go; None to keep none of them.
        lengths: of the prompts.
        rows: the slot of each.
        filler: positions after the last of them.
    """

    def __init__(
        self, slots: Slots | None, lengths: Sequence[int], rows: Sequence[int], filler: int, device: torch.device
    ) -> None:
        self._slots, self._num_real = slots, sum(lengths)
        documents = (*lengths, *([filler] if filler else []))
        offsets = None
        if device.type == "cuda":
            edges = torch.tensor([*accumulate(documents, initial=0)], dtype=torch.int32).to(device, non_blocking=True)
            offsets = (edges, edges)
        pairs = tuple((length, length) for length in documents)
        self._stretch = Stretch(((0, sum(documents)),), (pairs,), offsets)
        table = [(row, place) for row, length in zip(rows, lengths, strict=True) for place in range(length)]
        where = torch.tensor(table or [(0, 0)], device=device)
        self._rows, self._places = where[:, 0], where[:, 1]

    def attend(self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        """Each prompt sees itself."""
        if self._slots is not None:
            for held, new in zip(self._slots.of(layer, key, value), (key, value), strict=True):
                held[self._rows, :, self._places] = new[0, :, : self._num_real].transpose(0, 1)
        return attend(query, key, value, self._stretch, scores)


@dataclass
class StepPositions:
    """One further position of each of the first N rows.

    Attributes:
        lengths: [N] int64, the positions that each row has before; on the device, so that the host need not know.
        num_keys: the keys that are looked at; no row has more with the new one.
    """

    slots: Slots
    lengths: Tensor
    num_keys: int
    _masks: dict[int | None, Tensor] = field(default_factory=dict)

    def attend(self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        """Each position sees its own row up to itself. Query heads that share a key head are queries of one head."""
        num_rows, kv_heads = len(self.lengths), key.shape[1]
        rows = torch.arange(num_rows, device=key.device)
        found: list[Tensor] = []
        for held, new in zip(self.slots.of(layer, key, value), (key, value), strict=True):
            held[rows, :, self.lengths] = new[0].transpose(0, 1)
            found.append(held[:num_rows, :, : self.num_keys])
        queries = query[0].transpose(0, 1).reshape(num_rows, kv_heads, -1, query.shape[-1])
        mask = self._mask(scores.sliding_window, query)
        if scores.fused:
            out = F.scaled_dot_product_attention(queries, found[0], found[1], mask, scale=scores.scaling)
        else:
            out = _eager(queries, found[0], found[1], mask, scores)
        return out.reshape(1, num_rows, query.shape[1], -1)

    def _mask(self, window: int | None, like: Tensor) -> Tensor:
        """[N, 1, 1, K], 0 where the new position may look and -inf elsewhere; the same for all layers alike."""
        if window not in self._masks:
            places, lengths = torch.arange(self.num_keys, device=like.device)[None], self.lengths[:, None]
            hidden = places > lengths
            if window is not None:
                hidden |= places <= lengths - window
            mask = like.new_zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
            self._masks[window] = mask[:, None, None]
        return self._masks[window]


def _eager(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, settings: Scores) -> Tensor:
    """Attention with soft-capped scores (gemma 2) or sinks (gpt-oss), softmax in fp32.

    query [N, KV heads, G, d], key and value [N, KV heads, K, d], mask [N, 1, 1, K] -> [N, KV heads, G, value dim].
    """
    scores = query @ key.transpose(-1, -2) * settings.scale(query.shape[-1])
    if settings.softcap is not None:
        scores = settings.softcap * torch.tanh(scores / settings.softcap)
    scores = scores.float() + mask
    if settings.sinks is not None:
        sinks = settings.sinks.float().reshape(1, key.shape[1], -1, 1).expand(query.shape[0], -1, -1, 1)
        scores = torch.cat([scores, sinks], dim=-1)
    return scores.softmax(dim=-1)[..., : key.shape[2]].to(value.dtype) @ value


def rollout_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    rollout: Positions,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of a generating model: query [1, heads, S, d], key and value [1, KV heads, S, d].

    Returns:
        [1, S, heads, value dim] and None (no weights are kept).
    """
    if torch.is_autocast_enabled(query.device.type):  # see models/attention.py
        query, key, value = (t.to(torch.get_autocast_dtype(query.device.type)) for t in (query, key, value))
    scores = Scores(0.0, scaling, sliding_window, softcap, s_aux)
    return rollout.attend(module, query, key, value, scores), None


def can_roll_out(config: PreTrainedConfig, model_class: Any) -> bool:
    """Whether a model's answers can be generated here: its layers take their attention from Transformers' interface,
    carry no recurrent state, and see either all that is before them or a sliding window of it.

    Args:
        model_class: the PreTrainedModel that is built from the config.
    """
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or [])
    return is_exchangeable(config, model_class) and kinds <= _KINDS


@contextmanager
def attention_for_rollouts(model: PreTrainedModel) -> Iterator[None]:
    """Within it, a model runs this attention."""
    AttentionInterface.register(NAME, rollout_attention)
    before = model.config._attn_implementation or "eager"
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
