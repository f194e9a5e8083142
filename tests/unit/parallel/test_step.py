"""The step: loss and gradient do not depend on how the samples were cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fourfold.dataset.batch import IGNORE_INDEX, Batch, Example, Sample
from fourfold.dataset.collate import CutPolicy, cut, filler
from fourfold.losses.token import TokenLoss
from fourfold.models.forward import StepModel
from fourfold.parallel.reduce import clip_gradients
from fourfold.parallel.step import Scorer, Step, StepResult


def _model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config)


def _samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(1)
    samples = []
    for index, length in enumerate((5, 17, 9, 30, 3, 12)):
        ids = torch.randint(0, 97, (length,), generator=generator).tolist()
        prompt = length // 3
        labels = [IGNORE_INDEX] * prompt + ids[prompt:]
        documents = (7, 10) if length == 17 else ()
        samples.append(Sample({"": Example(ids, labels, documents)}, index))
    return samples


def _run(policy: CutPolicy) -> tuple[StepResult, list[torch.Tensor]]:
    model = _model()
    step = Step(
        StepModel(model, packed=policy.packed), TokenLoss(), torch.device("cpu"), nullcontext, lambda: filler(policy)
    )
    result = step.forward_backward(cut(_samples(), policy))
    return result, [p.grad for p in model.parameters() if p.grad is not None]


def _plain_loss() -> torch.Tensor:
    """Each document on its own through Transformers' forward, summed and divided once."""
    model, total, count = _model(), torch.zeros(()), 0
    for sample in _samples():
        example, start = sample.sequences[""], 0
        for length in example.documents:
            ids = torch.tensor([example.input_ids[start : start + length]])
            labels = torch.tensor(example.labels[start : start + length])
            logits = model(input_ids=ids).logits[0]
            total = total + torch.nn.functional.cross_entropy(
                logits[:-1], labels[1:], ignore_index=IGNORE_INDEX, reduction="sum"
            )
            count += int((labels[1:] != IGNORE_INDEX).sum())
            start += length
    return total / count


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("max_tokens", [1, 40, 1000])
def test_step_when_cut_differently_gives_the_same_loss_and_gradient(packed: bool, max_tokens: int) -> None:
    expected = _plain_loss().detach()
    result, grads = _run(CutPolicy(packed=packed, max_tokens=max_tokens))
    reference, reference_grads = _run(CutPolicy(packed=True, max_tokens=1000))
    assert result.loss == pytest.approx(float(expected), abs=2e-6)
    assert result.denominators == reference.denominators
    for grad, other in zip(grads, reference_grads, strict=True):
        torch.testing.assert_close(grad, other, atol=2e-6, rtol=1e-4)


def test_clip_gradients_when_above_the_limit_scales_to_it() -> None:
    parameter = torch.nn.Parameter(torch.zeros(4))
    parameter.grad = torch.tensor([3.0, 4.0, 0.0, 0.0])
    assert float(clip_gradients([parameter], 1.0)) == pytest.approx(5.0)
    torch.testing.assert_close(parameter.grad.norm(), torch.tensor(1.0), atol=1e-5, rtol=0)


def test_clip_gradients_when_zero_leaves_them_alone() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    clip_gradients([parameter], 0.0)
    assert parameter.grad.tolist() == [3.0, 4.0]


class _Asking(TokenLoss):
    """Asks the model for log-probabilities before each step."""

    def prepare(self, batches: Sequence[Batch], scorer: Scorer) -> list[Batch]:
        scorer.document_logps(batches, reference=False)
        return list(batches)


def test_step_when_it_asks_its_model_does_so_as_part_of_the_training_alone() -> None:
    entered: list[str] = []

    @contextmanager
    def asked() -> Iterator[None]:
        entered.append("asked")
        yield

    model, policy = _model(), CutPolicy(packed=True, max_tokens=40)
    step = Step(
        StepModel(model, packed=True),
        _Asking(),
        torch.device("cpu"),
        nullcontext,
        lambda: filler(policy),
        module=model,
        asked=asked,
    )
    batches = cut(_samples(), policy)
    model.eval()
    step.forward(batches)
    assert entered == []
    model.train()
    step.forward_backward(batches)
    assert entered == ["asked"]
    assert model.training
