from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from peft import PeftModel

from fourfold.base.errors import ConfigError, ModelError
from fourfold.config.model import ModelConfig
from fourfold.config.tuning import TuningConfig
from fourfold.models.adapters import attach, identify_base
from fourfold.models.load import load_model
from fourfold.models.parameters import describe_parameters
from fourfold.models.quantize import dequantize_model
from fourfold.models.weights import save_model
from tiny_models import Load, Logits, save_tiny_model

CPU = torch.device("cpu")
IDS = torch.arange(16)[None] * 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose layers fill whole blocks of 64 weights."""
    return save_tiny_model(tmp_path_factory.mktemp("q"), hidden_size=64, intermediate_size=128, head_dim=16)


@pytest.mark.parametrize(
    "keys",
    [
        {"quantization_bit": 4},
        {"quantization_bit": 4, "double_quantization": False},
        {"quantization_bit": 4, "quantization_type": "fp4"},
        {"quantization_bit": 8},
    ],
)
def test_qlora_trains_saves_and_reloads(
    tmp_path: Path, folder: Path, load: Load, logits: Logits, keys: dict[str, object]
) -> None:
    model, config = load(folder, **keys)
    kind = Linear8bitLt if keys["quantization_bit"] == 8 else Linear4bit
    assert isinstance(model.get_submodule("model.layers.0.mlp.up_proj"), kind)
    assert type(model.get_output_embeddings()) is torch.nn.Linear
    untuned = logits(model)
    tuned = attach(model, config, TuningConfig(), trainable=True).train()
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(3):
        loss = tuned(input_ids=IDS, labels=IDS).loss
        loss.backward()
        assert all(p.grad is not None for p in tuned.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        logits(tuned.eval())  # an evaluation in between must not end the training
        tuned.train()
    assert losses[2] < losses[1] < losses[0]
    expected = logits(tuned.eval())
    assert (expected - untuned).abs().max() > 0.01
    save_model(tuned, tmp_path, base=identify_base(config, TuningConfig()))
    again, config = load(folder, adapter_name_or_path=(str(tmp_path),), **keys)
    reloaded = attach(again, config, TuningConfig(), trainable=False)
    torch.testing.assert_close(logits(reloaded), expected, rtol=0, atol=0)


def test_a_quantised_checkpoint_is_loaded_as_it_is(tmp_path: Path, folder: Path, load: Load, logits: Logits) -> None:
    model, _ = load(folder, quantization_bit=4)
    model.save_pretrained(tmp_path)
    again = load_model(ModelConfig(model_name_or_path=str(tmp_path)), dtype=torch.bfloat16, device=CPU)
    layer = again.get_submodule("model.layers.0.mlp.up_proj")
    assert isinstance(layer, Linear4bit)
    assert layer.compute_dtype == torch.bfloat16
    again, _ = load(tmp_path)
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)


def test_an_adapter_fits_the_quantised_and_the_plain_checkpoint(tmp_path: Path, folder: Path, load: Load) -> None:
    model, _ = load(folder, quantization_bit=4)
    model.save_pretrained(tmp_path / "nf4")
    model, config = load(tmp_path / "nf4")
    tuned = attach(model, config, TuningConfig(), trainable=True)
    save_model(tuned, tmp_path / "adapter", base=identify_base(config, TuningConfig()))
    plain, config = load(folder, adapter_name_or_path=(str(tmp_path / "adapter"),))
    assert isinstance(attach(plain, config, TuningConfig(), trainable=False), PeftModel)


def test_bits_that_contradict_the_checkpoint_are_refused(tmp_path: Path, folder: Path, load: Load) -> None:
    load(folder, quantization_bit=4)[0].save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"quantization_bit: 8 contradicts the checkpoint, .* to 4 bits"):
        load(tmp_path, quantization_bit=8)


def test_dequantize_model_gives_a_plain_model_that_saves(
    tmp_path: Path, folder: Path, load: Load, logits: Logits
) -> None:
    model, _ = load(folder, quantization_bit=4)
    expected = logits(model)
    plain = dequantize_model(model, torch.float32)
    assert type(plain.get_submodule("model.layers.0.mlp.up_proj")) is torch.nn.Linear
    torch.testing.assert_close(logits(plain), expected, rtol=1e-5, atol=1e-5)
    save_model(plain, tmp_path)
    reloaded, _ = load(tmp_path)
    torch.testing.assert_close(logits(reloaded), logits(plain), rtol=0, atol=0)


def test_packed_weights_count_as_what_they_stand_for(folder: Path, load: Load) -> None:
    plain, _ = load(folder)
    packed, config = load(folder, quantization_bit=4)
    total = f"|| all params: {plain.num_parameters():,} ||"
    assert total in describe_parameters(packed)
    tuned = attach(packed, config, TuningConfig(lora_rank=1), trainable=True)
    # rank 1: (64 + 64) + 2 (64 + 32) + (64 + 64) for attention, 3 (64 + 128) for the MLP, over two layers
    assert describe_parameters(tuned).startswith("trainable params: 2,048 ||")


@pytest.mark.parametrize("keys", [{"finetuning_type": "full"}, {"finetuning_type": "freeze"}, {"pissa_init": True}])
def test_tunings_that_need_plain_weights_are_refused(folder: Path, load: Load, keys: dict[str, object]) -> None:
    model, config = load(folder, quantization_bit=4)
    with pytest.raises(ConfigError, match=r"quantised weights"):
        attach(model, config, TuningConfig(**keys), trainable=True)


def test_without_bitsandbytes_the_message_names_the_extra(
    folder: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install -e '\.\[quant\]'"):
        load(folder, quantization_bit=4)


def test_experts_that_stay_unquantised_are_reported(
    tmp_path: Path, load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    save_tiny_model(tmp_path, "mixtral")
    with caplog.at_level(logging.WARNING):
        load(tmp_path, quantization_bit=4)
    # 2 layers x 4 experts x 3 x 32 x 48 fp32 weights = 147,456 bytes
    assert "the expert weights stay in float32 and take 144.00 KiB" in caplog.text
