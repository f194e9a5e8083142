"""Models built without weights and filled afterwards: the same as those that Transformers loads."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from fourfold.config.load import load
from fourfold.models.adapters import attach
from fourfold.models.forward import StepModel
from fourfold.models.load import load_model, load_streamed
from fourfold.models.tokenizer import load_tokenizer
from fourfold.parallel.shares import Shares
from tiny_models import FAMILIES, save_tiny_model

_CPU = torch.device("cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_stream_when_filled_is_the_model_that_transformers_loads(family: str, tmp_path: Path) -> None:
    run = load({"model_name_or_path": str(save_tiny_model(tmp_path, family))})
    tokenizer = load_tokenizer(run.model)
    expected = load_model(run.model, dtype=torch.float32, device=_CPU, tokenizer=tokenizer)
    streamed = load_streamed(run.model, run.tuning, dtype=torch.float32, tokenizer=tokenizer)
    assert streamed is not None
    model, stream = streamed
    assert all(parameter.is_meta for parameter in model.parameters())
    assert StepModel(model, packed=False)._head is not None, "known before there are weights"
    stream.fill(model, _CPU, Shares())
    state, buffers = model.state_dict(), dict(model.named_buffers())
    assert [name for name, tensor in expected.state_dict().items() if not torch.equal(tensor, state[name])] == []
    assert [name for name, tensor in expected.named_buffers() if not torch.equal(tensor, buffers[name])] == []
    assert len(list(model.parameters())) == len(list(expected.parameters())), "what is tied stays so"
    assert model.config.to_dict() == expected.config.to_dict()
    assert model.generation_config.to_dict() == expected.generation_config.to_dict()  # type: ignore[union-attr]


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_stream_when_an_adapter_is_new_gives_it_the_same_weights(family: str, tmp_path: Path) -> None:
    run = load({"model_name_or_path": str(save_tiny_model(tmp_path, family)), "finetuning_type": "lora"})
    tokenizer = load_tokenizer(run.model)

    def tuned(model: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(5)
        module = attach(model, run.model, run.tuning, trainable=True)
        assert isinstance(module, PeftModel)
        return {name: p for name, p in module.named_parameters() if p.requires_grad}

    expected = tuned(load_model(run.model, dtype=torch.float32, device=_CPU, tokenizer=tokenizer))
    streamed = load_streamed(run.model, run.tuning, dtype=torch.float32, tokenizer=tokenizer)
    assert streamed is not None
    found = tuned(streamed[0])
    assert list(found) == list(expected)
    assert all(torch.equal(parameter, expected[name]) for name, parameter in found.items())


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"quantization_bit": 4}, "quantised"),
        ({"train_from_scratch": True}, "train_from_scratch"),
        ({"finetuning_type": "lora", "use_dora": True}, "use_dora"),
    ],
)
def test_stream_when_the_whole_weights_are_needed_says_why(
    settings: dict[str, Any], reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = load({"model_name_or_path": str(save_tiny_model(tmp_path)), **settings})
    tokenizer = load_tokenizer(run.model)
    with caplog.at_level(logging.INFO):
        assert load_streamed(run.model, run.tuning, dtype=torch.float32, tokenizer=tokenizer) is None
    assert reason in caplog.text


def test_stream_when_a_tensor_is_missing_leaves_it_to_transformers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = load({"model_name_or_path": str(save_tiny_model(tmp_path, "llama", num_hidden_layers=1))})
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 1', '"num_hidden_layers": 2'))
    tokenizer = load_tokenizer(run.model)
    with caplog.at_level(logging.INFO):
        assert load_streamed(run.model, run.tuning, dtype=torch.float32, tokenizer=tokenizer) is None
    assert "the checkpoint has no model.layers.1." in caplog.text
