"""A student's scores beside its teacher's, position by position: cross entropy of the labels, and the divergence.

Both models' logits are made for a chunk of trained positions at a time, from last hidden states, and none are kept for
the backward pass. Where ranks share the vocabulary, both models' are shared alike.

With a the weight of the divergence d, and the label's negative log-likelihood n:  loss = a d + (1 - a) n.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fourfold.losses.distillation import distillation_loss
from fourfold.parallel.loss import Outputs, at_positions, default_chunk, score_in_chunks
from fourfold.parallel.teacher import TeacherStates

KdKind = Literal["forward_kl", "reverse_kl", "jsd"]


@dataclass(frozen=True, slots=True)
class KdSettings:
    """How a student is compared with its teacher.

    Attributes:
        kind: KL(teacher, student), KL(student, teacher), or the generalised Jensen-Shannon divergence.
        beta: of the last, in [0, 1]; see losses/distillation.py.
        temperature: what both models' logits are divided by, above 0.
        alpha: weight of the divergence against the cross entropy of the labels, in [0, 1].
    """

    kind: KdKind = "forward_kl"
    beta: float = 0.5
    temperature: float = 1.0
    alpha: float = 0.5

    @property
    def divergence_beta(self) -> float:
        """The argument `beta` of `distillation_loss`."""
        return {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": self.beta}[self.kind]


@dataclass(frozen=True, slots=True)
class TaughtScores:
    """Of N trained positions.

    Attributes:
        loss: [N] fp32, alpha * divergence + (1 - alpha) * nll; it alone has a gradient.
        divergence: [N] fp32, from the teacher.
        nll: [N] fp32, negative log-likelihood of the target.
        positions: [N] int64, flat index into [B * S].
        correct: [N] bool, whether the target is the likeliest token; None unless asked for.
    """

    loss: Tensor
    divergence: Tensor
    nll: Tensor
    positions: Tensor
    correct: Tensor | None


def score_taught(
    outputs: Outputs,
    targets: Tensor,
    taught: Tensor,
    teacher: TeacherStates,
    settings: KdSettings,
    *,
    with_correct: bool = False,
    chunk_tokens: int | None = None,
) -> TaughtScores:
    """Score every trained position of a student, in fp32.

    Tokens beyond the smaller of two vocabularies, which pad it, are left out of the divergence.

    Args:
        targets: [B, S] int64 with IGNORE_INDEX where nothing is trained.
        taught: [N, teacher's hidden size], the teacher's last hidden states at the trained positions.
        teacher: whose head makes logits of them.
        with_correct: also tell whether each target is the likeliest token.
        chunk_tokens: positions whose logits exist at one time; None for half of the device's own, since there are the
            logits and the gradients of two losses.
    """
    positions = outputs.positions_of(targets)
    loss, divergence, nll, correct = score_in_chunks(
        _Compared(outputs, teacher, settings, with_correct),
        at_positions(outputs.hidden, positions),
        targets.reshape(-1).index_select(0, positions),
        taught,
        head_is_frozen=outputs.head_is_frozen,
        chunk_tokens=chunk_tokens or default_chunk(targets.device) // 2,
    )
    return TaughtScores(loss, divergence.detach(), nll.detach(), positions, correct if with_correct else None)


@dataclass(frozen=True, slots=True)
class _Compared:
    """The scores of a chunk of positions."""

    outputs: Outputs
    teacher: TeacherStates
    settings: KdSettings
    with_correct: bool

    def __call__(self, hidden: Tensor, targets: Tensor, taught: Tensor) -> tuple[Tensor, ...]:
        """[N, hidden size], [N], [N, teacher's hidden size] -> loss, divergence, nll [N] and correct [N], or empty."""
        share, settings = self.outputs.vocabulary, self.settings
        logits, wanted = self.outputs.head(hidden).float(), self._teachers(taught)
        common = min(logits.shape[-1], wanted.shape[-1])
        divergence = distillation_loss(
            logits[:, :common],
            wanted[:, :common],
            beta=settings.divergence_beta,
            temperature=settings.temperature,
            group=None if share is None else share.group,
        )
        with torch.set_grad_enabled(torch.is_grad_enabled() and settings.alpha < 1):
            nll, correct = self.outputs.score_logits(logits, targets, self.with_correct)
        loss = settings.alpha * divergence + (1 - settings.alpha) * nll if settings.alpha < 1 else divergence
        return loss, divergence, nll, correct

    @torch.no_grad()
    def _teachers(self, taught: Tensor) -> Tensor:
        """The teacher's logits, of the same tokens as the student's."""
        own, other = self.outputs.vocabulary, self.teacher.vocabulary
        assert self.teacher.head is not None, "the last pipeline stage"
        assert (own is None) == (other is None), "both models are split alike"
        assert own is None or other is None or own.start == other.start, "both vocabularies are cut alike"
        return self.teacher.head(taught)
