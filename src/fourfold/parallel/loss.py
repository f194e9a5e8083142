"""Log-probabilities and token losses from a model's outputs.

`Outputs` separates the last hidden state from the head, so that logits are only ever made for the positions that
need them, in chunks, and never as one [S, vocabulary] tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fourfold.dataset.batch import IGNORE_INDEX, Batch
from fourfold.parallel.exchange import add_up
from fourfold.parallel.vocabulary import VocabularyShare, shared_argmax, shared_cross_entropy

CHUNK_TOKENS = 2048
"""Positions whose logits exist at one time."""
_CPU_CHUNK_TOKENS = 128
"""The same on a CPU, where more bring no speed, and memory that stays small is used again."""
_HALF_SCALE = 1024.0
"""Factor on gradients that are made in fp16 before the loss's own is known, against underflow."""


@dataclass(frozen=True, slots=True)
class Outputs:
    """What a forward pass gives to the loss.

    Attributes:
        hidden: [B, S, hidden size]; output of the decoder after its last norm.
        head: maps hidden states [..., hidden size] to logits [..., vocabulary], with the family's scaling or
            soft-capping applied.
        router_loss: scalar load-balancing loss of a mixture-of-experts model (not yet scaled), or None.
        head_is_frozen: whether nothing in the head is trained.
        vocabulary: which tokens the head's logits are of, where ranks share the vocabulary; None for all.
        positions: the ranks that share each row's positions; None where this one has them all.
        value: maps hidden states [..., hidden size] to values [...] fp32; None for a model without a value head.
    """

    hidden: Tensor
    head: Callable[[Tensor], Tensor]
    router_loss: Tensor | None = None
    head_is_frozen: bool = False
    vocabulary: VocabularyShare | None = None
    positions: dist.ProcessGroup | None = None
    value: Callable[[Tensor], Tensor] | None = None

    def score(self, hidden: Tensor, targets: Tensor, with_correct: bool) -> tuple[Tensor, Tensor]:
        """hidden [N, hidden size], targets [N] -> nll [N] fp32, and whether each target is the likeliest (or empty)."""
        logits = self.head(hidden).float()
        share = self.vocabulary
        correct = torch.empty(0, dtype=torch.bool, device=targets.device)
        if with_correct:
            correct = (logits.argmax(-1) if share is None else shared_argmax(logits, share)) == targets
        if share is None:
            return F.cross_entropy(logits, targets, reduction="none"), correct
        return shared_cross_entropy(logits, targets, share), correct


@dataclass(frozen=True, slots=True)
class TokenScores:
    """What the model thinks of the trained positions; N of them.

    Attributes:
        nll: [N] fp32, negative log-likelihood of the target.
        positions: [N] int64, flat index into [B * S].
        correct: [N] bool, whether the target is the likeliest token; None unless asked for.
    """

    nll: Tensor
    positions: Tensor
    correct: Tensor | None


Score = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor]]
"""`Outputs.score`."""


class _FrozenHeadScores(torch.autograd.Function):
    """Scores under a head that is not trained, with the gradient made beside them, so that no logits are kept.

    Each nll_i depends on its own hidden state h_i alone, so with g_i = dL/dnll_i:  dL/dh_i = g_i * dnll_i/dh_i.
    The second factor is found while the chunk's logits exist; the backward pass only multiplies.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        score: Score,
        with_correct: bool,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor]:
        """hidden [N, hidden size], targets [N] -> nll [N] and correct [N], or empty."""
        ctx.factor = _HALF_SCALE if hidden.dtype == torch.float16 else 1.0
        pieces: list[tuple[Tensor, Tensor]] = []
        slopes: list[Tensor] = []
        for chunk, wanted in zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True):
            with torch.enable_grad():
                leaf = chunk.detach().requires_grad_()
                nll, correct = score(leaf, wanted, with_correct)
                slopes += torch.autograd.grad(nll.sum() * ctx.factor, leaf)
            pieces.append((nll.detach(), correct))
        ctx.save_for_backward(torch.cat(slopes))
        nll, correct = torch.cat([piece[0] for piece in pieces]), torch.cat([piece[1] for piece in pieces])
        ctx.mark_non_differentiable(correct)
        return nll, correct

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """grad [N]."""
        (slopes,) = ctx.saved_tensors
        return ((grad / ctx.factor)[:, None] * slopes).to(slopes.dtype), None, None, None, None


def score_tokens(
    outputs: Outputs, targets: Tensor, *, with_correct: bool = False, chunk_tokens: int | None = None
) -> TokenScores:
    """Score every trained position, in fp32.

    Logits are made for trained positions only, `chunk_tokens` at a time, and memory is bounded by one chunk of them:
    under a frozen head none are kept for the backward pass; under a trained one, with more than one chunk, each chunk
    is recomputed there.

    Args:
        targets: [B, S] int64 with IGNORE_INDEX where nothing is trained.
        with_correct: also tell whether each target is the likeliest token.
        chunk_tokens: None for the device's own.
    """
    if chunk_tokens is None:
        chunk_tokens = _CPU_CHUNK_TOKENS if targets.device.type == "cpu" else CHUNK_TOKENS
    flat_targets = targets.reshape(-1)
    positions = torch.nonzero(flat_targets != IGNORE_INDEX).squeeze(-1)
    hidden = outputs.hidden.reshape(-1, outputs.hidden.shape[-1]).index_select(0, positions)
    wanted = flat_targets.index_select(0, positions)
    if outputs.head_is_frozen and hidden.requires_grad and positions.numel():
        nll, correct = _FrozenHeadScores.apply(hidden, wanted, outputs.score, with_correct, chunk_tokens)  # type: ignore[misc]
    elif positions.numel() <= chunk_tokens:
        nll, correct = outputs.score(hidden, wanted, with_correct)
    else:
        pieces = [
            checkpoint(outputs.score, h, t, with_correct, use_reentrant=False)
            for h, t in zip(hidden.split(chunk_tokens), wanted.split(chunk_tokens), strict=True)
        ]
        nll, correct = torch.cat([piece[0] for piece in pieces]), torch.cat([piece[1] for piece in pieces])
    return TokenScores(nll, positions, correct if with_correct else None)


def at_temperature(outputs: Outputs, temperature: float) -> Outputs:
    """The outputs of a model whose logits are divided by a temperature, as sampling divides them."""
    if temperature == 1.0:
        return outputs
    head = outputs.head
    return replace(outputs, head=lambda hidden: head(hidden) / temperature)


def document_logps(outputs: Outputs, batch: Batch, weights: Tensor | None = None) -> Tensor:
    """Log-probability of each document's targets, [D] fp32; the same on all ranks that share the batch's positions.

    A loss that is made of it is one loss for all these ranks: each must count its share (`loss_share`).

    Args:
        weights: [B, S] fp32, of the targets; None for 1.
    """
    scores = score_tokens(outputs, batch.targets)
    logps = -scores.nll
    if weights is not None:
        logps = logps * weights.reshape(-1).index_select(0, scores.positions)
    documents = batch.document_ids.reshape(-1).index_select(0, scores.positions).long()
    sums = logps.new_zeros(len(batch.lengths)).index_add(0, documents, logps)
    return sums if outputs.positions is None else add_up(sums, outputs.positions)


def document_values(outputs: Outputs, batch: Batch) -> Tensor:
    """The value at the last token of each document, [D] fp32; the same on all ranks that share the batch's positions.

    A loss that is made of it is one loss for all these ranks: each must count its share (`loss_share`).
    """
    assert outputs.value is not None, "the model has no value head"
    lengths = torch.tensor(batch.lengths, device=batch.document_ids.device)
    documents = batch.document_ids.reshape(-1).long()
    is_last = (documents >= 0) & (batch.position_ids.reshape(-1) == lengths[documents.clamp(min=0)] - 1)
    positions = torch.nonzero(is_last).squeeze(-1)
    # also where no document of this rank ends, so that the head has a gradient, of zeros, on every rank
    values = outputs.value(outputs.hidden.reshape(-1, outputs.hidden.shape[-1]).index_select(0, positions))
    found = values.new_zeros(len(batch.lengths)).index_add(0, documents.index_select(0, positions), values)
    return found if outputs.positions is None else add_up(found, outputs.positions)


def loss_share(outputs: Outputs) -> float:
    """The part of a loss of whole documents that each rank counts, where several compute the same one."""
    return 1.0 if outputs.positions is None else 1.0 / outputs.positions.size()
