"""Tokenising by parts equals tokenising whole texts."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fourfold.base.errors import DataError
from fourfold.dataset import text_tokens
from fourfold.dataset.text_tokens import TextTokenizer, splits_at_blanks

WORDS = [
    "the",
    "Water's",
    "you'll",
    "  ",
    "\n",
    "\n\n",
    "\t",
    " ",
    "12",
    "3456",
    "²",
    "½",
    "é",
    "e\u0301",
    "\u0301",
    "北京",
]
WORDS += [
    "\u00a0",
    "\u3000",
    "\u0085",
    "\u200b",
    "\u1680",
    "\x1c",
    "😀",
    ".",
    "...",
    "(a)",
    "=>",
    "_x",
    "<|e|>",
    "'s",
    "I'M",
    "\r\n",
]
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
MODERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + REST
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)


def split(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


KNOWN = {
    "gpt2": BYTE_LEVEL,
    "digits": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTE_LEVEL]),
    "llama3": split(MODERN),
    "qwen": split(MODERN.replace("{1,3}", "")),
}


def random_texts(number: int) -> list[str]:
    random = np.random.default_rng(5)
    return ["".join(random.choice([*WORDS, *" " * 12], size=random.integers(1, 30))) for _ in range(number)]


def make_tokenizer(pre_tokenizer: Any) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|e|>"],
        show_progress=False,
    )
    backend.train_from_iterator(random_texts(300), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|e|>")


@pytest.mark.parametrize("kind", list(KNOWN))
def test_encode_when_cut_into_parts_equals_whole_texts(kind: str) -> None:
    tokenizer = make_tokenizer(KNOWN[kind])
    assert splits_at_blanks(json.loads(tokenizer.backend_tokenizer.to_str()))
    by_parts = TextTokenizer(tokenizer)
    texts = random_texts(2000)
    for _ in range(2):  # the second time with all parts known
        found = by_parts.encode(texts)
        assert [text for text in texts if list(found[text]) != tokenizer.encode(text, add_special_tokens=False)] == []


def differing(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[str]:
    """The texts for which tokenising by parts gives other ids; each is encoded twice."""
    by_parts = TextTokenizer(tokenizer)
    by_parts.encode(texts)
    found = by_parts.encode(texts)
    return [text for text in texts if list(found[text]) != tokenizer.encode(text, add_special_tokens=False)]


ADDED = ["<|a", "<|a|>", "<|a|>\n", "|>", "the", "\n\n", "Ω", *(f"<|r{number}|>" for number in range(300))]


@pytest.mark.parametrize("as_text", [False, True])
def test_encode_when_added_tokens_are_in_the_text_equals_whole_texts(as_text: bool) -> None:
    tokenizer = make_tokenizer(BYTE_LEVEL)
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in ADDED], special_tokens=True)
    tokenizer.add_tokens([AddedToken("é", normalized=True), AddedToken("<|a|>b", normalized=True)])
    tokenizer.split_special_tokens = as_text
    random = np.random.default_rng(6)
    words = [*WORDS, *ADDED, "b", *" " * 200]
    texts = ["".join(random.choice(words, size=random.integers(1, 30))) for _ in range(2000)]
    ids = {number for text in texts for number in tokenizer.encode(text, add_special_tokens=False)}
    assert (max(ids) >= tokenizer.convert_tokens_to_ids("<|r0|>")) is not as_text
    assert splits_at_blanks(json.loads(tokenizer.backend_tokenizer.to_str()))
    assert differing(tokenizer, texts) == []


def test_encode_when_too_many_parts_were_seen_forgets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_tokens, "_MOST_PARTS", 20)
    tokenizer = make_tokenizer(BYTE_LEVEL)
    by_parts = TextTokenizer(tokenizer)
    texts = random_texts(500)
    for text in texts:
        assert list(by_parts.encode([text])[text]) == tokenizer.encode(text, add_special_tokens=False)
    assert by_parts.num_remembered <= 2 * 20


def test_encode_when_there_are_no_texts_gives_nothing() -> None:
    assert TextTokenizer(make_tokenizer(BYTE_LEVEL)).encode([]) == {}


@pytest.mark.parametrize(
    "pre_tokenizer",
    [
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        pre_tokenizers.Metaspace(),
        split(r"\w+ \w+|."),
    ],
)
def test_splits_at_blanks_when_the_splitting_is_not_known_says_no(pre_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(pre_tokenizer)
    assert not splits_at_blanks(json.loads(tokenizer.backend_tokenizer.to_str()))
    texts = random_texts(50)
    found = TextTokenizer(tokenizer).encode(texts)
    assert all(list(found[text]) == tokenizer.encode(text, add_special_tokens=False) for text in texts)


@pytest.mark.parametrize("token", [AddedToken("<a b>"), AddedToken("<a>", lstrip=True), AddedToken("<a>", rstrip=True)])
def test_splits_at_blanks_when_an_added_token_reaches_over_blanks_says_no(token: AddedToken) -> None:
    tokenizer = make_tokenizer(BYTE_LEVEL)
    tokenizer.add_tokens([token])
    assert not splits_at_blanks(json.loads(tokenizer.backend_tokenizer.to_str()))


@pytest.mark.parametrize("by_parts", [False, True])
def test_encode_when_a_text_holds_half_of_a_character_says_which(
    by_parts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not by_parts:
        monkeypatch.setattr(text_tokens, "splits_at_blanks", lambda facts: False)
    texts = TextTokenizer(make_tokenizer(split(MODERN)))
    assert len(texts.encode(["well then"])) == 1
    with pytest.raises(DataError, match=r"half of a character \(\\ud83d after 'his is fine '\)"):
        texts.encode(["well then", "this is fine \ud83d."])
