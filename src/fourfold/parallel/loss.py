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


def _chunk_nll(hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
    return F.cross_entropy(head(hidden).float(), targets, reduction="none")


def token_nll(outputs: Outputs, targets: Tensor, *, chunk_tokens: int = CHUNK_TOKENS) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of every trained position, in fp32.

    Logits are made for trained positions only, `chunk_tokens` at a time; all chunks but a single one are
    recomputed in the backward pass, so memory is bounded by one chunk of logits.

    Args:
        targets: [B, S] int64 with IGNORE_INDEX where nothing is trained.
    Returns:
        nll [N] fp32 and the flat positions [N] int64 (into B * S) that it belongs to, N trained positions.
    """
    flat_targets = targets.reshape(-1)
    positions = torch.nonzero(flat_targets != IGNORE_INDEX).squeeze(-1)
    hidden = outputs.hidden.reshape(-1, outputs.hidden.shape[-1]).index_select(0, positions)
    wanted = flat_targets.index_select(0, positions)
    if positions.numel() <= chunk_tokens:
        return _chunk_nll(hidden, wanted, outputs.head), positions
    pieces = [
        checkpoint(_chunk_nll, h, t, outputs.head, use_reentrant=False)
        for h, t in zip(hidden.split(chunk_tokens), wanted.split(chunk_tokens), strict=True)
    ]
    return torch.cat(pieces), positions
