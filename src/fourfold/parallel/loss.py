"""Log-probabilities and token losses from a model's outputs.

`Outputs` separates the last hidden state from the head, so that logits are only ever made for the positions that
need them, in chunks, and never as one [S, vocabulary] tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fourfold.dataset.batch import IGNORE_INDEX, Batch, to_device
from fourfold.parallel.exchange import add_up
from fourfold.parallel.vocabulary import VocabularyShare, shared_argmax, shared_cross_entropy
from fourfold.planning.job import CHUNK_TOKENS, KEPT_CHUNK_TOKENS

_CPU_CHUNK_TOKENS = 128
"""Of positions whose logits exist at one time, on a CPU: more bring no speed, and memory that stays small is reused."""
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
        scored: see Batch.
        token_nll: logits [N, vocabulary] as the head gives them, targets [N] -> nll [N] fp32, where there is a faster
            way than PyTorch's own, which makes no copies of them.
        chunk_tokens: positions whose logits exist at one time; None for the device's own number.
        keep_logits: keep all of them for the backward pass, where there is `token_nll`.
    """

    hidden: Tensor
    head: Callable[[Tensor], Tensor]
    router_loss: Tensor | None = None
    head_is_frozen: bool = False
    vocabulary: VocabularyShare | None = None
    positions: dist.ProcessGroup | None = None
    value: Callable[[Tensor], Tensor] | None = None
    scored: Tensor | None = None
    token_nll: Callable[[Tensor, Tensor], Tensor] | None = None
    chunk_tokens: int | None = None
    keep_logits: bool = False

    def score(self, hidden: Tensor, targets: Tensor, with_correct: bool) -> tuple[Tensor, Tensor]:
        """hidden [N, hidden size], targets [N] -> nll [N] fp32, and whether each target is the likeliest (or empty)."""
        # the head's own logits are given a name nowhere, so that nothing keeps them beside those in fp32
        if self.token_nll is not None and self.vocabulary is None and not with_correct:
            nothing = torch.empty(0, dtype=torch.bool, device=targets.device)
            return self.token_nll(self.head(hidden), targets), nothing
        return self.score_logits(self.head(hidden).float(), targets, with_correct)

    def score_logits(self, logits: Tensor, targets: Tensor, with_correct: bool) -> tuple[Tensor, Tensor]:
        """The same of the head's logits [N, own tokens] fp32."""
        share = self.vocabulary
        correct = torch.empty(0, dtype=torch.bool, device=targets.device)
        if with_correct:
            correct = (logits.argmax(-1) if share is None else shared_argmax(logits, share)) == targets
        if share is None:
            return F.cross_entropy(logits, targets, reduction="none"), correct
        return shared_cross_entropy(logits, targets, share), correct

    def positions_of(self, targets: Tensor) -> Tensor:
        """[N] int64: where targets [B, S] are trained, as indices into [B * S]; without waiting if that is known."""
        return trained_positions(targets) if self.scored is None else self.scored

    def values_at(self, positions: Tensor) -> Tensor:
        """What the value head says at flat positions [N] of the hidden states: [N] fp32."""
        assert self.value is not None, "the model has no value head"
        return self.value(at_positions(self.hidden, positions))

    def sum_by_document(self, values: Tensor, positions: Tensor, batch: Batch) -> Tensor:
        """Sums [D] of values [N] at flat positions [N], by document; over all ranks that share the positions."""
        documents = batch.document_ids.reshape(-1).index_select(0, positions).long()
        sums = values.new_zeros(len(batch.lengths)).index_add(0, documents, values)
        return sums if self.positions is None else add_up(sums, self.positions)


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


Score = Callable[..., tuple[Tensor, ...]]
"""hidden [N, hidden size] and further tensors [N, ...] -> numbers [N, ...] of each position. The first are fp32 and may
be differentiated, the others are only looked at."""


class _FrozenHeadScores(torch.autograd.Function):
    """Scores under a head that is not trained, with the gradient made beside them, so that no logits are kept.

    Each first number s_i depends on its own hidden state h_i alone, so with g_i = dL/ds_i:  dL/dh_i = g_i * ds_i/dh_i.
    The second factor is found while the chunk's logits exist; the backward pass only multiplies.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, hidden: Tensor, score: Score, chunk_tokens: int, *beside: Tensor
    ) -> tuple[Tensor, ...]:
        """hidden [N, hidden size], beside [N, ...] -> what `score` gives."""
        ctx.factor = _HALF_SCALE if hidden.dtype == torch.float16 else 1.0
        pieces: list[tuple[Tensor, ...]] = []
        slopes: list[Tensor] = []
        for chunk, *others in _chunks(chunk_tokens, hidden, *beside):
            with torch.enable_grad():
                leaf = chunk.detach().requires_grad_()
                found = score(leaf, *others)
                slopes += torch.autograd.grad(found[0].sum() * ctx.factor, leaf)
            pieces.append(tuple(piece.detach() for piece in found))
        ctx.save_for_backward(torch.cat(slopes))
        first, *rest = map(torch.cat, zip(*pieces, strict=True))
        ctx.mark_non_differentiable(*rest)
        return first, *rest

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """grad [N]."""
        (slopes,) = ctx.saved_tensors
        found = ((grad / ctx.factor)[:, None] * slopes).to(slopes.dtype)
        return found, *(None for _ in ctx.needs_input_grad[1:])


def _chunks(chunk_tokens: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors [N, ...], at most so many positions at a time."""
    return zip(*(tensor.split(chunk_tokens) for tensor in tensors), strict=True)


def default_chunk(device: torch.device) -> int:
    """Positions whose logits exist at one time on a device."""
    return _CPU_CHUNK_TOKENS if device.type == "cpu" else CHUNK_TOKENS


def trained_positions(targets: Tensor) -> Tensor:
    """[N] int64: where targets [B, S] are trained, as indices into [B * S]."""
    return torch.nonzero(targets.reshape(-1) != IGNORE_INDEX).squeeze(-1)


def at_positions(hidden: Tensor, positions: Tensor) -> Tensor:
    """Hidden states [B, S, hidden size] at flat positions [N]: [N, hidden size]."""
    return hidden.reshape(-1, hidden.shape[-1]).index_select(0, positions)


def score_in_chunks(
    score: Score,
    hidden: Tensor,
    *beside: Tensor,
    head_is_frozen: bool,
    chunk_tokens: int,
    keep: bool = False,
) -> tuple[Tensor, ...]:
    """`score` of N positions, so many at a time. No logits are kept for the backward pass unless asked for.

    Args:
        hidden: [N, hidden size]; no gradient reaches `beside`, [N, ...] each.
        head_is_frozen: nothing that `score` uses is trained, so that the gradient can be made beside the scores;
            otherwise each chunk is computed again in the backward pass.
        keep: keep what belongs to every chunk, where it would be computed again.
    """
    if head_is_frozen and hidden.requires_grad and len(hidden):
        return _FrozenHeadScores.apply(hidden, score, chunk_tokens, *beside)  # type: ignore[return-value]
    if not torch.is_grad_enabled() or keep:
        pieces = [score(*chunk) for chunk in _chunks(chunk_tokens, hidden, *beside)]
    else:
        pieces = [checkpoint(score, *chunk, use_reentrant=False) for chunk in _chunks(chunk_tokens, hidden, *beside)]
    return tuple(map(torch.cat, zip(*pieces, strict=True)))


def score_tokens(
    outputs: Outputs, targets: Tensor, *, with_correct: bool = False, chunk_tokens: int | None = None
) -> TokenScores:
    """Score every trained position, in fp32.

    Logits are made for trained positions only, `chunk_tokens` at a time, and memory is bounded by one chunk of them:
    under a frozen head none are kept for the backward pass; under a trained one, with more than one chunk, each chunk
    is recomputed there, unless the outputs say that all are kept.

    Args:
        targets: [B, S] int64 with IGNORE_INDEX where nothing is trained.
        with_correct: also tell whether each target is the likeliest token.
        chunk_tokens: None for that of the outputs, or the device's own.
    """
    positions = outputs.positions_of(targets)
    chunk_tokens = chunk_tokens or outputs.chunk_tokens or default_chunk(targets.device)
    keeps_logits = outputs.keep_logits and outputs.token_nll is not None and not with_correct
    if keeps_logits:
        chunk_tokens = max(chunk_tokens, KEPT_CHUNK_TOKENS)
    nll, correct = score_in_chunks(
        partial(outputs.score, with_correct=with_correct),
        at_positions(outputs.hidden, positions),
        targets.reshape(-1).index_select(0, positions),
        head_is_frozen=outputs.head_is_frozen,
        chunk_tokens=chunk_tokens,
        keep=keeps_logits or len(positions) <= chunk_tokens,
    )
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
    return outputs.sum_by_document(logps, scores.positions, batch)


def document_values(outputs: Outputs, batch: Batch) -> Tensor:
    """The value at the last token of each document, [D] fp32; the same on all ranks that share the batch's positions.

    A loss that is made of it is one loss for all these ranks: each must count its share (`loss_share`).
    """
    count, device = len(batch.lengths), batch.document_ids.device
    lengths = to_device(torch.tensor(batch.lengths), device)
    documents = batch.document_ids.reshape(-1).long()
    is_last = (documents >= 0) & (batch.position_ids.reshape(-1) == lengths[documents.clamp(min=0)] - 1)
    # where each ends, or -1 if it does on another rank; a search for the positions would have the host wait
    places = torch.where(is_last, documents, count)
    ends = documents.new_full((count + 1,), -1).scatter(0, places, torch.arange(len(places), device=device))[:-1]
    # the head is asked for all, so that it has a gradient, of zeros, on every rank
    values = outputs.values_at(ends.clamp(min=0)).where(ends >= 0, 0.0)
    return values if outputs.positions is None else add_up(values, outputs.positions)


def loss_share(outputs: Outputs) -> float:
    """The part of a loss of whole documents that each rank counts, where several compute the same one."""
    return 1.0 if outputs.positions is None else 1.0 / outputs.positions.size()
