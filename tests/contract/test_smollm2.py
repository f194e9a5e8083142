"""The real model from its GGUF file is what its authors meant: tokens, shapes and an answer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fourfold.config.model import ModelConfig
from fourfold.config.tuning import TuningConfig
from fourfold.models.adapters import attach
from fourfold.models.identity import identify
from fourfold.models.load import load_model
from fourfold.models.parameters import describe_parameters
from fourfold.models.tokenizer import load_tokenizer
from fourfold.models.weights import save_model

pytestmark = pytest.mark.model
CPU = torch.device("cpu")


def test_tokenizer_splits_digits_and_knows_its_special_tokens(smollm2_gguf: Path) -> None:
    tokenizer = load_tokenizer(ModelConfig(model_name_or_path=str(smollm2_gguf)))
    assert tokenizer("2024")["input_ids"] == [34, 32, 34, 36]
    assert tokenizer.bos_token == "<|im_start|>"
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert len(tokenizer) == 49152
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert rendered.endswith("<|im_start|>user\nhi<|im_end|>\n")


def test_model_answers_and_is_the_same_from_its_folder(smollm2_gguf: Path, tmp_path: Path) -> None:
    config = ModelConfig(model_name_or_path=str(smollm2_gguf))
    tokenizer = load_tokenizer(config)
    model = load_model(config, dtype=torch.float32, device=CPU)
    assert model.num_parameters() == 134_515_008
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.config.rms_norm_eps == 1e-5

    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = torch.tensor([tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)])
    answer = model.generate(ids, max_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(ids), use_cache=True)
    assert tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True) == "The capital of France is Paris."

    with torch.no_grad():
        expected = model(ids).logits
    save_model(model, tmp_path, tokenizer=tokenizer)
    folder = ModelConfig(model_name_or_path=str(tmp_path))
    from_file, from_folder = identify(config), identify(folder)
    assert from_file is not None
    assert from_folder is not None
    assert from_file.weights == from_folder.weights
    reloaded = load_model(folder, dtype=torch.float32, device=CPU)
    with torch.no_grad():
        torch.testing.assert_close(reloaded(ids).logits, expected, rtol=0, atol=0)
    tuned = attach(reloaded, folder, TuningConfig(), trainable=True)
    assert describe_parameters(tuned) == (
        "trainable params: 2,442,240 || all params: 136,957,248 || trainable%: 1.7832"
    )
