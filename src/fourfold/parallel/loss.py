"""Log-probabilities and token losses from a model's outputs.

`Outputs` separates the last hidden state from the head, so that logits are only ever made for the positions that
need them, in chunks, and never as one [S, vocabulary] tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fourfold.dataset.batch import IGNORE_INDEX

CHUNK_TOKENS = 2048
"""Positions whose logits exist at one time."""


@dataclass(frozen=True, slots=True)
class Outputs:
    """What a forward pass gives to the loss.

    Attributes:
        hidden: [B, S, hidden size]; output of the decoder after its last norm.
        head: maps hidden states [..., hidden size] to logits [..., vocabulary], with the family's scaling or
            soft-capping applied.
        router_loss: scalar load-balancing loss of a mixture-of-experts model (not yet scaled), or None.
    """

    hidden: Tensor
    head: Callable[[Tensor], Tensor]
    router_loss: Tensor | None = None


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


def _score_chunk(
    hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor], with_correct: bool
) -> tuple[Tensor, Tensor]:
    logits = head(hidden).float()
    correct = logits.argmax(-1) == targets if with_correct else torch.empty(0, dtype=torch.bool, device=targets.device)
    return F.cross_entropy(logits, targets, reduction="none"), correct


def score_tokens(
    outputs: Outputs, targets: Tensor, *, with_correct: bool = False, chunk_tokens: int = CHUNK_TOKENS
) -> TokenScores:
    """Score every trained position, in fp32.

    Logits are made for trained positions only, `chunk_tokens` at a time. With more than one chunk each is recomputed
    in the backward pass, so memory is bounded by one chunk of logits.

    Args:
        targets: [B, S] int64 with IGNORE_INDEX where nothing is trained.
        with_correct: also tell whether each target is the likeliest token.
    """
    flat_targets = targets.reshape(-1)
    positions = torch.nonzero(flat_targets != IGNORE_INDEX).squeeze(-1)
    hidden = outputs.hidden.reshape(-1, outputs.hidden.shape[-1]).index_select(0, positions)
    wanted = flat_targets.index_select(0, positions)
    if positions.numel() <= chunk_tokens:
        nll, correct = _score_chunk(hidden, wanted, outputs.head, with_correct)
    else:
        pieces = [
            checkpoint(_score_chunk, h, t, outputs.head, with_correct, use_reentrant=False)
            for h, t in zip(hidden.split(chunk_tokens), wanted.split(chunk_tokens), strict=True)
        ]
        nll, correct = torch.cat([piece[0] for piece in pieces]), torch.cat([piece[1] for piece in pieces])
    return TokenScores(nll, positions, correct if with_correct else None)
