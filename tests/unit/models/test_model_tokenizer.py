from __future__ import annotations

from pathlib import Path

import pytest

from fourfold.base.errors import ModelError
from fourfold.config.model import ModelConfig
from fourfold.models.tokenizer import load_tokenizer
from tiny_models import save_tiny_model, tiny_tokenizer


def test_load_tokenizer_from_a_folder_keeps_template_and_special_tokens(llama_folder: Path) -> None:
    tokenizer = load_tokenizer(ModelConfig(model_name_or_path=str(llama_folder)))
    assert tokenizer.padding_side == "right"
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == (
        "<|im_start|>user\nhi<|im_end|>\n"
    )


def test_load_tokenizer_without_a_pad_token_takes_the_end_token(tmp_path: Path) -> None:
    bare = tiny_tokenizer()
    bare.pad_token = None
    save_tiny_model(tmp_path, tokenizer=bare)
    assert load_tokenizer(ModelConfig(model_name_or_path=str(tmp_path))).pad_token == "<|im_end|>"


def test_load_tokenizer_adds_tokens(llama_folder: Path) -> None:
    plain = load_tokenizer(ModelConfig(model_name_or_path=str(llama_folder)))
    config = ModelConfig(model_name_or_path=str(llama_folder), add_tokens="[A],[B]", add_special_tokens="<x>")
    tokenizer = load_tokenizer(config)
    assert len(tokenizer) == len(plain) + 3
    assert tokenizer("[B]<x>")["input_ids"] == [len(plain) + 1, len(plain) + 2]
    assert tokenizer.decode(tokenizer("[B]<x>")["input_ids"], skip_special_tokens=True) == "[B]"


def test_load_tokenizer_with_split_special_tokens_reads_them_as_text(llama_folder: Path) -> None:
    whole = load_tokenizer(ModelConfig(model_name_or_path=str(llama_folder)))
    split = load_tokenizer(ModelConfig(model_name_or_path=str(llama_folder), split_special_tokens=True))
    assert whole("<|im_end|>")["input_ids"] == [2]
    assert len(split("<|im_end|>")["input_ids"]) > 1


def test_load_tokenizer_when_the_path_is_wrong_names_it() -> None:
    with pytest.raises(ModelError, match=r"there is no folder \./nowhere"):
        load_tokenizer(ModelConfig(model_name_or_path="./nowhere"))


def test_load_tokenizer_when_the_folder_has_none_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"the tokenizer of .* cannot be loaded"):
        load_tokenizer(ModelConfig(model_name_or_path=str(tmp_path)))


def test_load_tokenizer_of_a_folder_without_one_names_the_files_that_are_missing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    with pytest.raises(ModelError, match=r"the folder has none of tokenizer\.json, tokenizer\.model"):
        load_tokenizer(ModelConfig(model_name_or_path=str(tmp_path)))
