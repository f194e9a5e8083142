"""Divergences between a teacher's and a student's distribution over the vocabulary, one number for each position.

With p the student's, q the teacher's distribution at temperature T, and m = (1 - beta) p + beta q:

    beta = 0:  KL(q, p), forward;   beta = 1:  KL(p, q), reverse;
    else:      beta KL(q, m) + (1 - beta) KL(p, m), the generalised Jensen-Shannon divergence (arXiv 2306.13649).

The vocabulary is walked in chunks, twice: for both log-sum-exps, then for the divergence. The gradient by a student's
logit z_v (of z / T) needs only them and one more number for each position, so a third walk makes it:

    forward:  p_v - q_v
    reverse:  p_v (log p_v / q_v - KL(p, q))
    else:     (1 - beta) p_v (log p_v / m_v - KL(p, m))

The last follows from d/dp_v [beta sum q log q/m + (1 - beta) sum p log p/m]
= -beta (1 - beta) q_v / m_v + (1 - beta) (log p_v/m_v + 1) - (1 - beta)^2 p_v / m_v = (1 - beta) log p_v/m_v,
as (beta q_v + (1 - beta) p_v) / m_v = 1; softmax then takes the mean under p off. Beside the student's gradient itself
nothing of the size [N, V] is made, in fp32 only one chunk.

Legend: N positions, V tokens of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

VOCABULARY_CHUNK = 8192
"""Tokens whose log-probabilities exist in fp32 at one time."""


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    beta: float,
    temperature: float = 1.0,
    chunk: int = VOCABULARY_CHUNK,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Divergence of the student from the teacher, at each position.

    As in TRL the loss is not multiplied by temperature squared.

    Args:
        student: [N, V] logits of any floating-point type; the gradient has the same.
        teacher: [N, V] logits over the same tokens; gets no gradient.
        beta: in [0, 1]; 0 for the forward KL, 1 for the reverse.
        temperature: what logits are divided by, above 0.
        chunk: tokens handled at one time.
        group: ranks that each hold some of the tokens of the vocabulary, both logits alike; the backward pass expects
            the same gradient on all of them. None where V is the whole.
    Returns:
        [N] fp32, at least 0 up to rounding, the same on all ranks of the group.
    Raises:
        ValueError: beta or temperature out of range, or different shapes.
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta is {beta:g}, not within [0, 1]")
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature:g}, not above 0")
    if student.shape != teacher.shape:
        raise ValueError(f"student's logits are {list(student.shape)}, teacher's {list(teacher.shape)}")
    return _Divergence.apply(student, teacher.detach(), _Settings(beta, 1 / temperature, chunk, group))  # type: ignore[return-value]


def forward_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher, student): [N, V] and [N, V] logits -> [N] fp32. The student learns to cover all the teacher does."""
    return distillation_loss(student, teacher, beta=0.0, temperature=temperature)


def reverse_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(student, teacher): [N, V] and [N, V] logits -> [N] fp32. The student learns to stay where the teacher is."""
    return distillation_loss(student, teacher, beta=1.0, temperature=temperature)


@dataclass(frozen=True, slots=True)
class _Settings:
    """Arguments of distillation_loss, with the inverse of the temperature."""

    beta: float
    scale: float
    chunk: int
    group: dist.ProcessGroup | None

    def sum_ranks(self, numbers: Tensor) -> Tensor:
        """Added up over the ranks, in place."""
        if self.group is not None:
            dist.all_reduce(numbers, group=self.group)
        return numbers

    def log_normaliser(self, logits: Tensor) -> Tensor:
        """[N, V] -> [N] log-sum-exp of scaled logits over the whole vocabulary."""
        largest = logits.amax(-1).float() * self.scale
        if self.group is not None:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.group)
        total = torch.zeros_like(largest)
        for piece in logits.split(self.chunk, -1):
            total += (piece.float() * self.scale - largest[:, None]).exp_().sum(-1)
        return largest + self.sum_ranks(total).log()

    def log_probabilities(
        self, student: Tensor, teacher: Tensor, of_student: Tensor, of_teacher: Tensor
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Chunk by chunk: its columns, log p and log q."""
        for start in range(0, student.shape[-1], self.chunk):
            columns = slice(start, min(start + self.chunk, student.shape[-1]))
            log_p = student[:, columns].float() * self.scale - of_student[:, None]
            yield columns, log_p, teacher[:, columns].float() * self.scale - of_teacher[:, None]

    def log_mixture(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """log((1 - beta) p + beta q)."""
        return torch.logaddexp(log_p + math.log1p(-self.beta), log_q + math.log(self.beta))


def _weigh(log_weights: Tensor, log_numerator: Tensor, log_denominator: Tensor) -> Tensor:
    """w * log(numerator / denominator); 0 where w is 0, as for tokens that are not allowed (logits of -inf)."""
    weights = log_weights.exp()
    return torch.where(weights > 0, weights * (log_numerator - log_denominator), 0)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, settings: _Settings) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """[N, V] and [N, V] -> [N]."""
        of_student, of_teacher = settings.log_normaliser(student), settings.log_normaliser(teacher)
        beta, sums = settings.beta, torch.zeros(2, len(student), device=student.device)
        for _, log_p, log_q in settings.log_probabilities(student, teacher, of_student, of_teacher):
            if beta == 0:
                sums[0] += _weigh(log_q, log_q, log_p).sum(-1)
            elif beta == 1:
                sums[1] += _weigh(log_p, log_p, log_q).sum(-1)
            else:
                log_m = settings.log_mixture(log_p, log_q)
                sums[0] += _weigh(log_q, log_q, log_m).sum(-1)
                sums[1] += _weigh(log_p, log_p, log_m).sum(-1)
        of_q, of_p = settings.sum_ranks(sums)
        ctx.save_for_backward(student, teacher, of_student, of_teacher, of_p)
        ctx.settings = settings
        return of_q if beta == 0 else of_p if beta == 1 else beta * of_q + (1 - beta) * of_p

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """grad [N]."""
        student, teacher, of_student, of_teacher, of_p = ctx.saved_tensors
        settings: _Settings = ctx.settings
        beta, found = settings.beta, torch.empty_like(student)
        factor = (grad.float() * settings.scale)[:, None]
        for columns, log_p, log_q in settings.log_probabilities(student, teacher, of_student, of_teacher):
            if beta == 0:
                slopes = log_p.exp() - log_q.exp()
            else:
                compared = log_q if beta == 1 else settings.log_mixture(log_p, log_q)
                slopes = _weigh(log_p, log_p, compared) - log_p.exp() * of_p[:, None]
                slopes *= 1.0 if beta == 1 else 1 - beta
            found[:, columns] = slopes * factor
        return found, None, None
