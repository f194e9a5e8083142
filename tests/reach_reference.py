"""Attention told who sees what, by plain products; and the rows that it is tried on."""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold.dataset.batch import Keys
from fourfold.models.document_attention import Reach


def visible(reach: Reach, window: int | None) -> Tensor:
    """[S, K] bool, by what is told of the queries."""
    (first, own), keys = reach[0].long(), torch.arange(reach[1].shape[1], device=reach[1].device)
    seen = (keys >= first[:, None]) & (keys <= own[:, None])
    return seen if window is None else seen & (keys > own[:, None] - window)


def attend(query: Tensor, key: Tensor, value: Tensor, reach: Reach, window: int | None, scale: float) -> Tensor:
    """query [1, H, S, d], key and value [1, G, K, d] -> [1, H, S, d]."""
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
    scores = query @ key.transpose(-1, -2) * scale
    return scores.masked_fill(~visible(reach, window), float("-inf")).softmax(-1) @ value


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
