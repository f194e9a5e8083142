"""Attention told who sees what, by plain products; and the rows that it is tried on."""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold.dataset.batch import Keys
from fourfold.models.document_attention import Reach
from fourfold.parallel.scores import Scores


def visible(reach: Reach, window: int | None) -> Tensor:
    """[S, K] bool, by what is told of the queries."""
    (first, own), keys = reach[0].long(), torch.arange(reach[1].shape[1], device=reach[1].device)
    seen = (keys >= first[:, None]) & (keys <= own[:, None])
    return seen if window is None else seen & (keys > own[:, None] - window)


def attend(query: Tensor, key: Tensor, value: Tensor, reach: Reach, scores: Scores) -> Tensor:
    """query [1, H, S, d], key and value [1, G, K, d] -> [1, H, S, d]."""
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
    found = query @ key.transpose(-1, -2) * scores.scale(query.shape[-1])
    if scores.softcap is not None:
        found = scores.softcap * torch.tanh(found / scores.softcap)
    found = found.masked_fill(~visible(reach, scores.sliding_window), float("-inf"))
    if scores.sinks is not None:
        found = torch.cat([found, scores.sinks[None, :, None, None].expand(*found.shape[:3], 1).to(found.dtype)], -1)
    return found.softmax(-1)[..., : key.shape[2]] @ value


def in_rows(tensor: Tensor) -> Tensor:
    """[1, heads, S, d] as kernels of attention leave it: in memory [S, heads, d]."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def offsets_of(lengths: tuple[int, ...], device: str = "cpu") -> Tensor:
    """[D + 1] int32."""
    ends = torch.tensor(lengths, device=device).cumsum(0)
    return torch.cat([ends.new_zeros(1), ends]).int()


def keys_of(lengths: tuple[int, ...], more: tuple[int, ...], device: str = "cpu") -> Keys:
    """Keys of documents that see so many more than their own positions; which ones is all the same."""
    together = tuple(own + other for own, other in zip(lengths, more, strict=True))
    index = torch.zeros(sum(together), dtype=torch.long, device=device)
    return Keys(index, offsets_of(together, device), together, index.new_zeros(2, sum(lengths)))
