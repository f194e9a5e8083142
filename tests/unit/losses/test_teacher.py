"""A student's scores beside its teacher's: plain torch on whole logits, and no logits kept."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fourfold.dataset.batch import IGNORE_INDEX
from fourfold.losses.teacher import KdKind, KdSettings, TaughtScores, score_taught
from fourfold.parallel.loss import Outputs, score_tokens
from fourfold.parallel.teacher import TeacherStates

_HIDDEN, _OTHER_HIDDEN, _TOKENS, _VOCABULARY = 7, 13, 29, 41


class Pair:
    """Hidden states and heads of a student and a teacher, of another width and perhaps with other rows."""

    def __init__(self, *, rows: int = _VOCABULARY, frozen: bool = False, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.head = nn.Linear(_HIDDEN, _VOCABULARY, bias=False).to(dtype).requires_grad_(not frozen)
        self.teacher_head = nn.Linear(_OTHER_HIDDEN, rows, bias=False).to(dtype).requires_grad_(False)
        self.hidden = (3 * torch.randn(1, _TOKENS, _HIDDEN)).to(dtype).requires_grad_()
        self.taught = 3 * torch.randn(_TOKENS, _OTHER_HIDDEN).to(dtype)
        self.targets = torch.randint(0, min(rows, _VOCABULARY), (1, _TOKENS))
        self.targets[0, ::4] = IGNORE_INDEX
        self.trained = self.targets[0] != IGNORE_INDEX
        self.outputs = Outputs(self.hidden, self.head, head_is_frozen=frozen)

    def score(self, settings: KdSettings, chunk_tokens: int = 5) -> TaughtScores:
        states = TeacherStates((), self.teacher_head)
        taught = self.taught[self.trained]
        return score_taught(
            self.outputs, self.targets, taught, states, settings, with_correct=True, chunk_tokens=chunk_tokens
        )

    def gradients(self, loss: Tensor) -> list[Tensor]:
        """Of a weighted sum of the loss, in the hidden states and the head if it is trained."""
        wanted = [self.hidden, *(p for p in self.head.parameters() if p.requires_grad)]
        return list(torch.autograd.grad(torch.dot(loss, torch.linspace(0.1, 2.0, len(loss)).to(loss)), wanted))

    def plain(self, settings: KdSettings) -> tuple[Tensor, Tensor, Tensor]:
        """The definitions on whole logits, in fp64: loss, divergence, nll."""
        logits = F.linear(self.hidden[0, self.trained].double(), self.head.weight.double())
        wanted = F.linear(self.taught[self.trained].double(), self.teacher_head.weight.double())
        common = min(logits.shape[-1], wanted.shape[-1])
        p = (logits[:, :common] / settings.temperature).softmax(-1)
        q = (wanted[:, :common] / settings.temperature).softmax(-1)
        m = (1 - settings.beta) * p + settings.beta * q
        divergence = {
            "forward_kl": q * (q / p).log(),
            "reverse_kl": p * (p / q).log(),
            "jsd": settings.beta * q * (q / m).log() + (1 - settings.beta) * p * (p / m).log(),
        }[settings.kind].sum(-1)
        nll = F.cross_entropy(logits, self.targets[0, self.trained], reduction="none")
        return settings.alpha * divergence + (1 - settings.alpha) * nll, divergence, nll


@pytest.mark.parametrize("frozen", [False, True], ids=["trained_head", "frozen_head"])
@pytest.mark.parametrize("rows", [_VOCABULARY, _VOCABULARY + 7, _VOCABULARY - 5])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize(("alpha", "temperature"), [(0.3, 1.0), (1.0, 2.0)])
def test_score_taught_when_made_in_chunks_equals_whole_logits(
    kind: KdKind, rows: int, frozen: bool, alpha: float, temperature: float
) -> None:
    settings = KdSettings(kind, beta=0.4, temperature=temperature, alpha=alpha)
    pair = Pair(rows=rows, frozen=frozen)
    found, (loss, divergence, nll) = pair.score(settings), pair.plain(settings)
    torch.testing.assert_close(found.loss, loss.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.divergence, divergence.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.nll, nll.float(), rtol=1e-5, atol=1e-6)
    assert torch.equal(found.positions, pair.trained.nonzero().squeeze(-1))
    likeliest = pair.head(pair.hidden[0, pair.trained]).argmax(-1)
    assert torch.equal(found.correct, likeliest == pair.targets[0, pair.trained])  # type: ignore[arg-type]
    for grad, wanted in zip(pair.gradients(found.loss), pair.gradients(loss), strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 4e-3)])
def test_score_taught_when_the_head_is_frozen_in_half_gives_the_gradient_of_a_trained_one(
    dtype: torch.dtype, tolerance: float
) -> None:
    settings = KdSettings("jsd", alpha=0.5)
    one, other = Pair(dtype=dtype), Pair(dtype=dtype, frozen=True)
    wanted = one.gradients(one.score(settings).loss)[0]
    [found] = other.gradients(other.score(settings).loss)
    assert found.dtype == dtype
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()))


def test_score_taught_when_nothing_is_trained_gives_none() -> None:
    pair = Pair()
    pair.targets.fill_(IGNORE_INDEX)
    pair.trained = pair.targets[0] != IGNORE_INDEX
    found = pair.score(KdSettings())
    assert found.loss.numel() == found.nll.numel() == 0
    assert float(pair.gradients(found.loss)[0].abs().sum()) == 0


def _kept(make: Callable[[], Any]) -> list[tuple[int, ...]]:
    """Shapes of all that is kept for a backward pass after a forward pass, and as wide as the vocabulary."""
    kept: list[weakref.ref[Tensor]] = []

    def note(tensor: Tensor) -> Tensor:
        own = tensor.detach()
        kept.append(weakref.ref(own))
        return own

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        found = make()
    shapes = [tuple(tensor.shape) for tensor in (ref() for ref in kept) if tensor is not None]
    assert found is not None
    return [shape for shape in shapes if shape and shape[-1] == _VOCABULARY]


class _Widest(TorchDispatchMode):
    """The most rows of anything that is as wide as the vocabulary."""

    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor) or tensor.ndim < 2 or tensor.shape[-1] != _VOCABULARY:
                continue
            if (rows := tensor.numel() // _VOCABULARY) not in (_HIDDEN, _OTHER_HIDDEN):  # heads, transposed
                self.rows = max(self.rows, rows)
        return out


@pytest.mark.parametrize("frozen", [False, True], ids=["trained_head", "frozen_head"])
@pytest.mark.parametrize("chunk_tokens", [5, 1000])
def test_score_taught_when_scored_keeps_no_logits_for_the_backward_pass(frozen: bool, chunk_tokens: int) -> None:
    pair = Pair(frozen=frozen)
    assert _kept(lambda: pair.score(KdSettings("jsd"), chunk_tokens)) == []


def test_score_tokens_when_of_a_single_chunk_keeps_logits() -> None:
    """The control: the test above would see logits that are kept."""
    pair = Pair()
    assert (int(pair.trained.sum()), _VOCABULARY) in _kept(lambda: score_tokens(pair.outputs, pair.targets))


@pytest.mark.parametrize("frozen", [False, True], ids=["trained_head", "frozen_head"])
def test_score_taught_when_scored_never_makes_more_than_a_chunk_of_logits(frozen: bool) -> None:
    pair = Pair(frozen=frozen)
    with _Widest() as seen:
        pair.gradients(pair.score(KdSettings(), 5).loss)
    assert seen.rows == 5
