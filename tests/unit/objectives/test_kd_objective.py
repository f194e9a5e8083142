"""Stage kd through the step: the loss of whole models on whole sequences, however the step is cut."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from fourfold.dataset.batch import IGNORE_INDEX, Example, Sample
from fourfold.dataset.collate import CutPolicy, cut, filler
from fourfold.losses.teacher import KdSettings
from fourfold.losses.token import TokenLoss
from fourfold.models.forward import StepModel
from fourfold.objectives.kd import DistillationObjective
from fourfold.parallel.step import Step, StepResult
from fourfold.training.teacher import LoadedTeacher
from tiny_models import VOCAB_SIZE, tiny_model

_SETTINGS = KdSettings("jsd", beta=0.3, temperature=1.5, alpha=0.6)
_CPU = torch.device("cpu")


def _samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(1)
    samples = []
    for index, length in enumerate((5, 17, 9, 30, 3, 12)):
        ids = torch.randint(0, VOCAB_SIZE, (length,), generator=generator).tolist()
        weights = torch.rand(length, generator=generator).tolist()
        prompt = length // 3
        samples.append(Sample({"": Example(ids, [IGNORE_INDEX] * prompt + ids[prompt:], weights=weights)}, index))
    return samples


def _student() -> PreTrainedModel:
    return tiny_model("llama")


def _teacher() -> PreTrainedModel:
    return tiny_model("qwen3", seed=3, hidden_size=48, num_hidden_layers=3).requires_grad_(False)


def _run(student: PreTrainedModel, policy: CutPolicy, settings: KdSettings = _SETTINGS) -> StepResult:
    module = _teacher()
    arguments = (_CPU, nullcontext, lambda: filler(policy))
    teacher = Step(StepModel(module, packed=policy.packed), TokenLoss(), *arguments, module=module)
    step = Step(
        StepModel(student, packed=policy.packed),
        DistillationObjective(settings, TokenLoss(accuracy=True)),
        *arguments,
        teacher=LoadedTeacher(teacher),
    )
    return step.forward_backward(cut(_samples(), policy))


def _plain(student: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Weighted means of the divergence and of the cross entropy, each sample on its own, on whole logits in fp64."""
    teacher, sums, count = _teacher(), torch.zeros(2, dtype=torch.float64), 0.0
    for sample in _samples():
        example = sample.sequences[""]
        ids, labels = torch.tensor([example.input_ids]), torch.tensor(example.labels[1:])
        trained = labels != IGNORE_INDEX
        weights = torch.tensor(example.weights, dtype=torch.float64)[1:][trained]
        logits, wanted = (model(input_ids=ids).logits[0, :-1][trained].double() for model in (student, teacher))
        p, q = ((each / _SETTINGS.temperature).softmax(-1) for each in (logits, wanted))
        m = (1 - _SETTINGS.beta) * p + _SETTINGS.beta * q
        divergence = _SETTINGS.beta * q * (q / m).log() + (1 - _SETTINGS.beta) * p * (p / m).log()
        nll = F.cross_entropy(logits, labels[trained], reduction="none")
        sums = sums + torch.stack([weights @ divergence.sum(-1), weights @ nll])
        count += float(weights.sum())
    return tuple(sums / count)  # type: ignore[return-value]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("max_tokens", [1, 40, 1000])
def test_kd_when_cut_differently_gives_the_loss_and_gradient_of_whole_logits(packed: bool, max_tokens: int) -> None:
    student, plain = _student(), _student()
    result = _run(student, CutPolicy(packed=packed, max_tokens=max_tokens))
    parts = _plain(plain)
    (0.6 * parts[0] + 0.4 * parts[1]).backward()
    divergence, nll = (float(part.detach()) for part in parts)
    assert result.loss == pytest.approx(0.6 * divergence + 0.4 * nll, abs=1e-5)
    assert result.terms == pytest.approx({"kd": 0.6 * divergence, "nll": 0.4 * nll}, abs=1e-5)
    assert result.metrics["kd_loss"] == pytest.approx(divergence, abs=1e-5)
    assert result.metrics["ce_loss"] == pytest.approx(nll, abs=1e-5)
    assert 0 <= result.metrics["accuracy"] <= 1
    for (name, one), (_, other) in zip(student.named_parameters(), plain.named_parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(one.grad, other.grad, atol=2e-6, rtol=1e-4, msg=name)


def test_kd_when_labels_do_not_count_has_one_term() -> None:
    result = _run(_student(), CutPolicy(packed=True, max_tokens=40), KdSettings("forward_kl", alpha=1.0))
    assert list(result.terms) == ["kd"]
    assert result.loss == pytest.approx(result.metrics["kd_loss"], rel=1e-6)


def test_kd_when_a_step_runs_keeps_no_logits_for_the_backward_pass() -> None:
    kept: list[tuple[int, ...]] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        _run(_student(), CutPolicy(packed=True, max_tokens=1000))
    assert kept
    assert [shape for shape in kept if shape and shape[-1] == VOCAB_SIZE] == []
