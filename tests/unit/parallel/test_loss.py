"""Scores of tokens: the gradient made beside the loss is the one that autograd would find."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourfold.dataset.batch import IGNORE_INDEX
from fourfold.parallel import loss
from fourfold.parallel.loss import Outputs, score_tokens

_HIDDEN, _VOCABULARY, _TOKENS = 8, 11, 13


def scored(dtype: torch.dtype, *, frozen: bool, chunk_tokens: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, which targets are the likeliest token, and the gradient of a weighted sum in the hidden states."""
    torch.manual_seed(0)
    head = nn.Linear(_HIDDEN, _VOCABULARY, bias=False).to(dtype).requires_grad_(not frozen)
    hidden = torch.randn(1, _TOKENS, _HIDDEN).to(dtype).requires_grad_()
    targets = torch.randint(0, _VOCABULARY, (1, _TOKENS))
    targets[0, ::3] = IGNORE_INDEX
    found = score_tokens(
        Outputs(hidden, head, head_is_frozen=frozen), targets, with_correct=True, chunk_tokens=chunk_tokens
    )
    assert found.correct is not None
    torch.dot(found.nll, torch.arange(1.0, 1.0 + len(found.nll)) / 1000).backward()
    assert hidden.grad is not None
    return found.nll.detach(), found.correct, hidden.grad


@pytest.mark.parametrize("chunk_tokens", [4, 100])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_score_tokens_when_the_head_is_frozen_gives_the_same_gradient(
    dtype: torch.dtype, tolerance: float, chunk_tokens: int
) -> None:
    nll, correct, grad = scored(dtype, frozen=False)
    other_nll, other_correct, other_grad = scored(dtype, frozen=True, chunk_tokens=chunk_tokens)
    torch.testing.assert_close(other_nll, nll, rtol=tolerance, atol=tolerance)
    assert torch.equal(other_correct, correct)
    assert other_grad.dtype == dtype
    torch.testing.assert_close(other_grad, grad, rtol=tolerance, atol=tolerance * float(grad.abs().max()))


def test_score_tokens_when_the_head_is_frozen_keeps_no_logits() -> None:
    head = nn.Linear(_HIDDEN, _VOCABULARY).requires_grad_(False)
    hidden = torch.randn(1, _TOKENS, _HIDDEN, requires_grad=True)
    found = score_tokens(Outputs(hidden, head, head_is_frozen=True), torch.ones(1, _TOKENS, dtype=torch.int64))
    assert [tuple(kept.shape) for kept in found.nll.grad_fn.saved_tensors] == [(_TOKENS, _HIDDEN)]  # type: ignore[union-attr]


def test_score_tokens_when_the_outputs_name_a_chunk_makes_so_many_logits_at_a_time() -> None:
    seen: list[int] = []
    weight = torch.randn(_VOCABULARY, _HIDDEN)

    def head(hidden: Tensor) -> Tensor:
        seen.append(len(hidden))
        return hidden @ weight.T

    outputs = Outputs(torch.randn(1, _TOKENS, _HIDDEN, requires_grad=True), head, head_is_frozen=True, chunk_tokens=5)
    score_tokens(outputs, torch.ones(1, _TOKENS, dtype=torch.int64))
    assert seen == [5, 5, 3]


def test_score_tokens_when_nothing_is_trained_gives_none() -> None:
    hidden = torch.randn(1, 3, _HIDDEN, requires_grad=True)
    head = nn.Linear(_HIDDEN, _VOCABULARY).requires_grad_(False)
    found = score_tokens(Outputs(hidden, head, head_is_frozen=True), torch.full((1, 3), IGNORE_INDEX))
    assert found.nll.numel() == 0


@pytest.mark.parametrize(("keeps", "made"), [(True, [8, 5]), (False, [4, 4, 4, 1, 1, 4, 4, 4])])
def test_score_tokens_when_logits_are_kept_makes_them_once(
    keeps: bool, made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "KEPT_CHUNK_TOKENS", 8)
    weight = torch.randn(_VOCABULARY, _HIDDEN, dtype=torch.float64)
    hidden = torch.randn(1, _TOKENS, _HIDDEN, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, _VOCABULARY, (1, _TOKENS))
    seen: list[int] = []

    def head(states: Tensor) -> Tensor:
        seen.append(len(states))
        return states @ trained.T

    def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets, reduction="none")

    trained = weight.clone().requires_grad_()
    outputs = Outputs(hidden, head, token_nll=token_nll, chunk_tokens=4, keep_logits=keeps)
    score_tokens(outputs, targets).nll.sum().backward()
    assert seen == made
    other = weight.clone().requires_grad_()
    F.cross_entropy(hidden.detach()[0] @ other.T, targets[0], reduction="sum").backward()
    torch.testing.assert_close(trained.grad, other.grad)
