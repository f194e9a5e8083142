"""A vocabulary shared by tensor-parallel ranks: embedding, head and cross entropy of which each rank has some tokens.

With logits z_v, the negative log-likelihood of a target t is  log sum_v exp(z_v - m) - (z_t - m),  m = max_v z_v.
Maximum, sum and z_t are each found on the ranks' own tokens and then over the ranks: three numbers a position travel,
never the logits. Its gradient is  softmax(z)_v - [v = t],  each rank's own tokens again.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fourfold.parallel.exchange import join, reduce


@dataclass(frozen=True, slots=True)
class VocabularyShare:
    """The tokens [start, stop) of this rank.

    Attributes:
        group: the ranks that share the vocabulary, in the order of their tokens.
    """

    start: int
    stop: int
    group: dist.ProcessGroup

    def own(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids of any shape -> their local ids (0 where the token is another rank's), and whether it is own."""
        own = (tokens >= self.start) & (tokens < self.stop)
        return torch.where(own, tokens - self.start, 0), own


class _OwnTokens:
    """What an embedding's two hooks tell each other: which positions have an own token."""

    def __init__(self, share: VocabularyShare) -> None:
        self._share = share
        self._own: Tensor | None = None

    def enter(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        tokens, self._own = self._share.own(args[0])
        return (tokens, *args[1:])

    def leave(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        assert self._own is not None
        return reduce(output.masked_fill(~self._own[..., None], 0.0), self._share.group)


def share_embedding(embedding: nn.Embedding, share: VocabularyShare) -> None:
    """Let an embedding that has this rank's rows look up what it has; what the ranks find is added up.

    No rank ever makes a gradient of the whole table.
    """
    padding = embedding.padding_idx
    if padding is not None:  # its row gets no gradient
        embedding.padding_idx = padding - share.start if share.start <= padding < share.stop else None
    tokens = _OwnTokens(share)
    embedding.register_forward_pre_hook(tokens.enter)
    # before any other hook, so that noise is added once, and to whole embeddings
    embedding.register_forward_hook(tokens.leave, prepend=True)


class _SharedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, share: VocabularyShare) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        largest = logits.amax(-1)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=share.group)
        weights = (logits - largest[:, None]).exp_()
        tokens, own = share.own(targets)
        at_target = (logits.gather(1, tokens[:, None]).squeeze(1) - largest).masked_fill(~own, 0.0)
        sums = torch.stack([weights.sum(-1), at_target])
        dist.all_reduce(sums, group=share.group)
        ctx.save_for_backward(weights.div_(sums[0][:, None]), tokens, own)
        return sums[0].log() - sums[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        softmax, tokens, own = ctx.saved_tensors
        found = softmax.scatter_add(1, tokens[:, None], -own[:, None].to(softmax.dtype))
        return found.mul_(grad[:, None]), None, None


def shared_cross_entropy(logits: Tensor, targets: Tensor, share: VocabularyShare) -> Tensor:
    """Negative log-likelihood of each target.

    Args:
        logits: [N, own tokens] fp32.
        targets: [N] int64, ids of the whole vocabulary.
    Returns:
        [N] fp32, the same on all ranks. Its backward pass expects the same gradient on all ranks.
    """
    return _SharedCrossEntropy.apply(logits, targets, share)  # type: ignore[return-value]


@torch.no_grad()
def shared_argmax(logits: Tensor, share: VocabularyShare) -> Tensor:
    """The likeliest token of each row: [N, own tokens] -> [N] int64; the first of equally likely ones."""
    values, tokens = logits.max(-1)
    largest = values.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=share.group)
    found = torch.where(values == largest, tokens + share.start, torch.iinfo(torch.int64).max)
    dist.all_reduce(found, op=dist.ReduceOp.MIN, group=share.group)
    return found


@torch.no_grad()
def num_tokens(share: VocabularyShare) -> int:
    """Tokens of the whole vocabulary; every rank of the group must call."""
    total = torch.tensor([share.stop])
    dist.all_reduce(total, op=dist.ReduceOp.MAX, group=share.group)  # on the host, so that no device is waited for
    return int(total)


@torch.no_grad()
def join_logits(logits: Tensor, share: VocabularyShare, total: int) -> Tensor:
    """The logits of all `total` tokens, the same on all ranks: [N, own tokens] -> [N, tokens]."""
    size = share.group.size()
    edges = [rank * total // size for rank in range(size + 1)]
    widest = max(stop - start for start, stop in pairwise(edges))
    joined = join(F.pad(logits, (0, widest - logits.shape[-1])), 1, share.group)
    if widest * size == total:
        return joined
    starts = range(0, widest * size, widest)
    return torch.cat(
        [joined[:, at : at + stop - start] for at, (start, stop) in zip(starts, pairwise(edges), strict=True)], dim=1
    )
