"""A model gives both answers the same log-probabilities and gradients whether they share their prompt or not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fourfold.dataset.batch import IGNORE_INDEX, Example, Sample
from fourfold.dataset.collate import CutPolicy, cut
from fourfold.models.forward import StepModel
from fourfold.parallel.loss import document_logps
from tiny_models import tiny_model

APART = CutPolicy(packed=True, max_tokens=4096)


def samples() -> list[Sample]:
    """Pairs whose prompts are longer than tiny models' sliding windows, and one with a short prompt."""
    found = []
    for index, (prompt, *sizes) in enumerate([(40, 9, 5), (3, 6, 6), (25, 4, 12)]):
        ids = [(11 * i + index) % 250 + 3 for i in range(prompt)]
        answers = [[(k + 17 * i) % 250 + 3 for i in range(size)] for k, size in enumerate(sizes)]
        examples = [Example(ids + own, [IGNORE_INDEX] * prompt + own) for own in answers]
        found.append(Sample(dict(zip(("chosen", "rejected"), examples, strict=True)), index))
    return found


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3_text", "mistral", "gpt_oss"])
def test_answers_when_their_prompt_is_shared_are_as_likely(family: str) -> None:
    found: list[tuple[Tensor, list[Tensor]]] = []
    for shares in (0, 16):
        model = tiny_model(family)
        [batch] = cut(samples(), replace(APART, shares_prompts=shares))
        assert (batch.keys is not None) == (shares > 0)
        logps = document_logps(StepModel(model, packed=True)(batch), batch)
        (logps * torch.tensor([1.0, -0.5, 2.0, 0.3, -1.0, 1.5])).sum().backward()
        found.append((logps.detach(), [p.grad for p in model.parameters() if p.grad is not None]))
    (expected, gradients), (logps, other) = found
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-4)
    for one, two in zip(gradients, other, strict=True):
        assert float((one - two).abs().max()) <= 1e-4 * float(one.abs().max())
