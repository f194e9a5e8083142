"""Divergences from a teacher: equal to TRL's and to plain torch, in value and gradient, in little memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fourfold.losses.distillation import distillation_loss, forward_kl, reverse_kl
from trl_losses import trl_divergence

BETAS = (0.0, 0.3, 0.5, 1.0)


def make_logits(rows: int = 6, vocabulary: int = 37, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Student, which asks for a gradient, and teacher."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = 2 * torch.randn(2, rows, vocabulary, generator=generator)
    return student.clone().requires_grad_(), teacher.clone()


def plain(student: Tensor, teacher: Tensor, beta: float, temperature: float) -> Tensor:
    """The definition, with sums over whole rows, in fp64."""
    p = (student.double() / temperature).softmax(-1)
    q = (teacher.double() / temperature).softmax(-1)
    if beta == 0:
        return (q * (q / p).log()).sum(-1)
    if beta == 1:
        return (p * (p / q).log()).sum(-1)
    m = (1 - beta) * p + beta * q
    return beta * (q * (q / m).log()).sum(-1) + (1 - beta) * (p * (p / m).log()).sum(-1)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk", [5, 37, 4096])
def test_distillation_loss_when_compared_equals_trl_and_plain_torch(
    beta: float, temperature: float, chunk: int
) -> None:
    student, teacher = make_logits()
    losses = distillation_loss(student, teacher, beta=beta, temperature=temperature, chunk=chunk)
    torch.testing.assert_close(losses, trl_divergence(student, teacher, beta, temperature), rtol=1e-6, atol=1e-6)
    wanted = plain(student, teacher, beta, temperature)
    torch.testing.assert_close(losses, wanted.float(), rtol=1e-6, atol=1e-6)
    weights = torch.linspace(-1, 2, len(losses))
    (grad,) = torch.autograd.grad(torch.dot(losses, weights), student)
    (wanted_grad,) = torch.autograd.grad(torch.dot(wanted, weights.double()), student)
    torch.testing.assert_close(grad, wanted_grad, rtol=1e-5, atol=1e-6)


def test_forward_and_reverse_kl_when_compared_equal_torch() -> None:
    student, teacher = make_logits()
    p, q = student.log_softmax(-1), teacher.log_softmax(-1)
    forward = F.kl_div(p, q, reduction="none", log_target=True).sum(-1)
    reverse = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(forward_kl(student, teacher), forward, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(reverse_kl(student, teacher), reverse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_distillation_loss_when_student_is_the_teacher_is_0_without_gradient(beta: float) -> None:
    student, _ = make_logits()
    losses = distillation_loss(student, student.detach() + 3.0, beta=beta, chunk=8)
    (grad,) = torch.autograd.grad(losses.sum(), student)
    assert losses.abs().max() < 1e-6
    assert grad.abs().max() < 1e-6


@pytest.mark.parametrize("beta", BETAS)
def test_distillation_loss_when_tokens_are_not_allowed_leaves_them_out(beta: float) -> None:
    student, teacher = make_logits(vocabulary=12)
    barred = torch.full((6, 3), -math.inf)
    wider = torch.cat([student, barred], 1).detach().requires_grad_()
    losses = distillation_loss(wider, torch.cat([teacher, barred], 1), beta=beta, chunk=5)
    torch.testing.assert_close(losses, distillation_loss(student, teacher, beta=beta), rtol=1e-6, atol=1e-6)
    (grad,) = torch.autograd.grad(losses.sum(), wider)
    assert grad.isfinite().all()
    assert torch.equal(grad[:, 12:], torch.zeros(6, 3))


@pytest.mark.parametrize("beta", BETAS)
def test_distillation_loss_when_logits_are_extreme_stays_finite(beta: float) -> None:
    student = torch.tensor([[1e4, 0.0, -1e4], [0.0, 1e4, 0.0]]).requires_grad_()
    teacher = torch.tensor([[-1e4, 0.0, 1e4], [0.0, 1e4, 0.0]])
    losses = distillation_loss(student, teacher, beta=beta, chunk=2)
    (grad,) = torch.autograd.grad(losses.sum(), student)
    assert losses.isfinite().all()
    assert grad.isfinite().all()
    if 0 < beta < 1:  # of two distributions that share nothing: the entropy of a coin that falls so
        entropy = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
        assert losses[0].item() == pytest.approx(entropy, rel=1e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_distillation_loss_when_logits_are_half_precision_is_that_of_their_fp32(beta: float) -> None:
    student, teacher = (logits.detach().bfloat16() for logits in make_logits())
    student.requires_grad_()
    losses = distillation_loss(student, teacher, beta=beta, chunk=8)
    (grad,) = torch.autograd.grad(losses.sum(), student)
    whole = student.detach().float().requires_grad_()
    wanted = distillation_loss(whole, teacher.float(), beta=beta)
    (wanted_grad,) = torch.autograd.grad(wanted.sum(), whole)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad, wanted_grad.bfloat16())


def test_distillation_loss_when_there_are_no_positions_is_empty() -> None:
    student, teacher = make_logits(rows=0)
    losses = distillation_loss(student, teacher, beta=0.5)
    (grad,) = torch.autograd.grad(losses.sum(), student)
    assert losses.shape == (0,)
    assert grad.shape == (0, 37)


class _LargestNew(TorchDispatchMode):
    """Elements of the largest tensor at each place in memory that is not one of the given tensors'."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in given}
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor) and (where := leaf.untyped_storage().data_ptr()) not in self.known:
                self.sizes[where] = max(self.sizes.get(where, 0), leaf.numel())
        return made


@pytest.mark.parametrize("beta", BETAS)
def test_distillation_loss_when_the_vocabulary_is_large_makes_one_chunk_at_a_time(beta: float) -> None:
    rows, vocabulary, chunk = 4, 640, 64
    student, teacher = make_logits(rows, vocabulary)
    with _LargestNew(student, teacher) as forward:
        losses = distillation_loss(student, teacher, beta=beta, chunk=chunk)
    assert max(forward.sizes.values()) == rows * chunk
    ones = torch.ones(rows)
    with _LargestNew(student, teacher) as backward:
        (grad,) = torch.autograd.grad(losses, student, ones)
    large = {where for where, size in backward.sizes.items() if size > rows * chunk}
    assert large == {grad.untyped_storage().data_ptr()}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"beta": 1.5}, "beta is 1.5"),
        ({"beta": 0.5, "temperature": 0.0}, "temperature is 0"),
    ],
)
def test_distillation_loss_when_numbers_are_out_of_range_says_so(settings: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        distillation_loss(*make_logits(), **settings)


def test_distillation_loss_when_vocabularies_differ_says_so() -> None:
    student, teacher = make_logits()
    with pytest.raises(ValueError, match=r"student's logits are \[6, 37\], teacher's \[6, 36\]"):
        distillation_loss(student, teacher[:, :-1], beta=0.5)
