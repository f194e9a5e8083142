"""Packing is exact for every family: documents in one row get what each would get alone."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, PreTrainedModel

from family_axes import packs
from fourfold.dataset.batch import IGNORE_INDEX, Example, Sample
from fourfold.dataset.collate import CutPolicy, cut, filler
from fourfold.losses.token import TokenLoss
from fourfold.models.forward import StepModel, supports_packing
from fourfold.parallel.step import Step
from tiny_models import EVERY_FAMILY, tiny_model

_PACKED = [family for family in sorted(EVERY_FAMILY) if packs(family)]
_LENGTHS = (7, 31, 2, 18)


def _samples(vocab_size: int) -> list[Sample]:
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, vocab_size, (length,), generator=generator).tolist() for length in _LENGTHS]
    return [Sample({"": Example(ids, [IGNORE_INDEX, *ids[1:]])}, i) for i, ids in enumerate(rows)]


@pytest.mark.parametrize("family", _PACKED)
def test_packed_row_when_compared_with_documents_alone_gives_the_same_logits(family: str) -> None:
    alone, packed = tiny_model(family), tiny_model(family)
    alone.set_attn_implementation("eager")
    assert supports_packing(packed)
    samples = _samples(packed.config.vocab_size)
    [batch] = cut(samples, CutPolicy(packed=True, max_tokens=1000))
    with torch.no_grad():
        outputs = StepModel(packed, packed=True)(batch)
        logits = outputs.head(outputs.hidden)[0]
        for sample, found in zip(samples, logits.split(_LENGTHS), strict=True):
            ids = torch.tensor([sample.sequences[""].input_ids])
            torch.testing.assert_close(found, alone(input_ids=ids, use_cache=False).logits[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", _PACKED)
def test_gradient_when_packed_or_padded_or_cut_is_the_same(family: str) -> None:
    results = []
    for policy in (
        CutPolicy(packed=True, max_tokens=1000),
        CutPolicy(packed=True, max_tokens=35),
        CutPolicy(packed=False, max_tokens=1000),
    ):
        model = tiny_model(family).train()
        step = Step(
            StepModel(model, packed=policy.packed),
            TokenLoss(),
            torch.device("cpu"),
            nullcontext,
            partial(filler, policy),
        )
        result = step.forward_backward(cut(_samples(model.config.vocab_size), policy))
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        results.append((result.loss, torch.cat([g.flatten() for g in grads])))
    (loss, grad), *others = results
    for other_loss, other_grad in others:
        assert other_loss == pytest.approx(loss, abs=1e-5)
        assert float((other_grad - grad).abs().max()) <= 1e-5 * float(grad.abs().max())


def _tiny_bloom() -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=384, hidden_size=32, n_layer=2, n_head=4))
    assert isinstance(model, PreTrainedModel)
    return model


@pytest.mark.parametrize(
    ("family", "kept"), [("llama", True), ("gemma2", True), ("qwen3_5_text", False), ("bloom", False)]
)
def test_rows_of_several_documents_when_padded_are_kept_whole_where_the_model_keeps_documents_apart(
    family: str, kept: bool
) -> None:
    """bloom makes its mask without positions; a gated delta net carries a state from one document to the next."""
    alone = _samples(300)
    examples = [sample.sequences[""] for sample in alone]
    tokens, labels = ([t for e in examples for t in getattr(e, name)] for name in ("input_ids", "labels"))
    one = Sample({"": Example(tokens, labels, _LENGTHS)}, 0)
    results = []
    for samples in (alone, [one]):
        model = (_tiny_bloom() if family == "bloom" else tiny_model(family)).train()
        step_model = StepModel(model, packed=False)
        assert step_model.keeps_rows_apart == kept
        policy = CutPolicy(packed=False, max_tokens=1000, apart=not step_model.keeps_rows_apart)
        batches = cut(samples, policy)
        assert [len(batch.input_ids) for batch in batches] == [1 if kept and samples == [one] else len(_LENGTHS)]
        step = Step(step_model, TokenLoss(), torch.device("cpu"), nullcontext, partial(filler, policy))
        results.append(step.forward_backward(batches).loss)
    assert results[1] == pytest.approx(results[0], abs=1e-5)
