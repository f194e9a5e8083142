from __future__ import annotations

import logging
from pathlib import Path

import gguf
import pytest
from tokenizers import pre_tokenizers

from fourfold.base.errors import ModelError
from fourfold.models.gguf_tokenizer import load_gguf_tokenizer
from tiny_models import CHAT_TEMPLATE

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool>"]
TOKENS = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "20", "24", "2024", "Ġa"]
MERGES = ["2 0", "2 4", "20 24", "Ġ a"]


def _write(path: Path, pre: str | None, *, add_bos: bool = False, model: str | None = "gpt2") -> Path:
    writer = gguf.GGUFWriter(str(path), "llama")
    if model is not None:
        writer.add_tokenizer_model(model)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3, 4] + [1] * (len(TOKENS) - 4))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(add_bos)
    writer.add_chat_template(CHAT_TEMPLATE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _pieces(path: Path, text: str) -> list[str]:
    tokenizer = load_gguf_tokenizer(path)
    return tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("smollm", ["2", "0", "2", "4", "Ġa"]),  # every digit by itself
        ("qwen2", ["2", "0", "2", "4", "Ġa"]),
        ("deepseek-coder", ["2", "0", "2", "4", "Ġa"]),
        ("gpt-2", ["2024", "Ġa"]),  # digits merge freely
        ("llama-bpe", ["20", "2", "4", "Ġa"]),  # at most three digits: 202, 4
        ("deepseek-v3", ["20", "2", "4", "Ġa"]),
    ],
)
def test_load_gguf_tokenizer_splits_as_the_named_pre_tokenizer_does(
    tmp_path: Path, pre: str, expected: list[str]
) -> None:
    assert _pieces(_write(tmp_path / "a.gguf", pre), "2024 a") == expected


def test_load_gguf_tokenizer_restores_special_tokens_and_template(tmp_path: Path) -> None:
    tokenizer = load_gguf_tokenizer(_write(tmp_path / "a.gguf", "smollm"))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert tokenizer("a<|im_end|><tool>")["input_ids"] == [TOKENS.index("a"), 2, 3]
    assert tokenizer.decode([2, TOKENS.index("a"), 3], skip_special_tokens=True) == "a<tool>"


def test_load_gguf_tokenizer_adds_the_first_token_only_where_the_file_says_so(tmp_path: Path) -> None:
    assert _pieces(_write(tmp_path / "a.gguf", "gpt-2"), "a") == ["a"]
    assert _pieces(_write(tmp_path / "b.gguf", "gpt-2", add_bos=True), "a") == ["<|im_start|>", "a"]


def test_load_gguf_tokenizer_with_an_unknown_pre_tokenizer_warns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        load_gguf_tokenizer(_write(tmp_path / "a.gguf", "martian"))
    assert "'martian', which is not known" in caplog.text


def test_load_gguf_tokenizer_without_one_says_so(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no tokenizer"):
        load_gguf_tokenizer(_write(tmp_path / "a.gguf", None, model=None))
