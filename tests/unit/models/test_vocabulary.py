from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fourfold.base.errors import ConfigError
from fourfold.config.model import ModelConfig
from fourfold.config.tuning import TuningConfig
from fourfold.models.adapters import attach
from fourfold.models.load import load_model
from fourfold.models.tokenizer import load_tokenizer
from tiny_models import VOCAB_SIZE, save_tiny_model

CPU = torch.device("cpu")
MANY = ",".join(f"<new{i}>" for i in range(40))
"""More tokens than the tiny embedding has spare rows."""


def _load(config: ModelConfig) -> tuple[torch.nn.Module, int]:
    tokenizer = load_tokenizer(config)
    model = load_model(config, dtype=torch.float32, device=CPU, tokenizer=tokenizer)
    return model, len(tokenizer)


@pytest.mark.parametrize("tied", [False, True])
def test_new_tokens_get_rows_near_the_mean(tmp_path: Path, tied: bool) -> None:
    save_tiny_model(tmp_path, tie_word_embeddings=tied)
    before, _ = _load(ModelConfig(model_name_or_path=str(tmp_path)))
    model, num_tokens = _load(ModelConfig(model_name_or_path=str(tmp_path), add_special_tokens=MANY))
    assert VOCAB_SIZE < num_tokens <= 448
    for layer, old in (
        (model.get_input_embeddings(), before.get_input_embeddings()),
        (model.get_output_embeddings(), before.get_output_embeddings()),
    ):
        weight = layer.weight.detach()
        assert weight.shape == (448, 32)  # 398 tokens, rounded up to a multiple of 64
        torch.testing.assert_close(weight[:VOCAB_SIZE], old.weight.detach(), rtol=0, atol=0)
        mean = old.weight.detach().mean(dim=0)
        spread = (weight[VOCAB_SIZE:] - mean).std().item()
        assert spread == pytest.approx(32**-0.5, rel=0.1)


def test_described_tokens_start_as_the_mean_of_their_description(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model")
    described = tmp_path / "tokens.yaml"
    described.write_text("<think>: who are you\n", encoding="utf-8")
    config = ModelConfig(
        model_name_or_path=str(tmp_path / "model"),
        new_special_tokens_config=str(described),
        init_special_tokens="desc_init",
    )
    model, _ = _load(config)
    tokenizer = load_tokenizer(config)
    weight = model.get_input_embeddings().weight.detach()
    expected = weight[tokenizer("who are you")["input_ids"]].mean(dim=0)
    torch.testing.assert_close(weight[tokenizer.convert_tokens_to_ids("<think>")], expected)


def test_described_tokens_when_the_file_is_no_mapping_says_so(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    (tmp_path / "tokens.yaml").write_text("- a\n- b\n", encoding="utf-8")
    config = ModelConfig(model_name_or_path=str(tmp_path), new_special_tokens_config=str(tmp_path / "tokens.yaml"))
    with pytest.raises(ConfigError, match="must map each token to a text"):
        load_tokenizer(config)


@pytest.mark.parametrize(("tied", "expected"), [(True, {"embed_tokens"}), (False, {"embed_tokens", "lm_head"})])
def test_lora_with_a_grown_vocabulary_trains_embedding_and_head(tmp_path: Path, tied: bool, expected: set[str]) -> None:
    save_tiny_model(tmp_path, tie_word_embeddings=tied)
    config = ModelConfig(model_name_or_path=str(tmp_path), add_special_tokens=MANY)
    tokenizer = load_tokenizer(config)
    model = load_model(config, dtype=torch.float32, device=CPU, tokenizer=tokenizer)
    attach(model, config, TuningConfig(), trainable=True)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad and "lora" not in name}
    assert {name.split(".modules_to_save")[0].split(".")[-1] for name in trained} == expected


def test_load_model_when_the_end_token_has_no_row_says_what_to_do(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    config = ModelConfig(model_name_or_path=str(tmp_path))
    tokenizer = load_tokenizer(config)
    tokenizer.add_tokens([f"<new{i}>" for i in range(40)])
    tokenizer.add_special_tokens({"eos_token": "<|eot_id|>"})
    with pytest.raises(ConfigError, match=r"template: needs the token <\|eot_id\|>.*384 rows.*resize_vocab: true"):
        load_model(config, dtype=torch.float32, device=CPU, tokenizer=tokenizer)
