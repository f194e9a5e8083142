"""Tokenising many texts at once, each different text, and where that is exact each different word, once.

Most byte-level tokenizers first split a text by a regular expression and then merge bytes within each piece. In the
expressions listed here a blank between two visible characters always begins a piece: no alternative has a blank in it
but as its first character, or in a run of blanks that must not end before a visible character. So such a tokenizer
gives the same ids for a text as for its parts, cut before these blanks, one after the other. (Before digits this holds
for single blanks only: some tokenizers cut digits out first, and then a run of blanks is a piece of its own.) Parts
recur, since natural text has few words, and looking one up costs a fraction of tokenising it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerFast

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PART_START = re.compile(r" (?<!\s )(?=\S)")
_MOST_PARTS = 1 << 17
"""Parts that are remembered; about 40 MB."""
_LONGEST_PART = 32
"""Longer parts hardly recur and are not remembered."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = (
    _CONTRACTIONS + "|" + _WORDS + r"|\p{N}{1,3}|" + _REST,  # Llama 3
    _CONTRACTIONS + "|" + _WORDS + r"|\p{N}|" + _REST,  # Qwen 2 and 3
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",  # GPT-2; ByteLevel has it built in
)


class TextTokenizer:
    """Token ids of texts, without special tokens around them; equal to `tokenizer.encode` of each text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._backend = None
        self._words: dict[str, list[int]] = {}
        self._by_parts = False
        if isinstance(tokenizer, PreTrainedTokenizerFast):
            tokenizer.encode("", add_special_tokens=False)  # settles truncation, padding and special-token splitting
            self._backend = tokenizer.backend_tokenizer
            self._by_parts = splits_at_blanks(json.loads(self._backend.to_str()))

    def encode(self, texts: Iterable[str]) -> dict[str, list[int]]:
        """The token ids of each different text."""
        unique = list(dict.fromkeys(texts))
        encode = self._encode_by_parts if self._by_parts else self._encode_whole
        return dict(zip(unique, encode(unique), strict=True))

    def _encode_whole(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        if self._backend is None:
            return self._tokenizer(list(texts), add_special_tokens=False)["input_ids"]  # pyright: ignore[reportReturnType]
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _encode_by_parts(self, texts: Sequence[str]) -> list[list[int]]:
        cut = [_PART_START.split(text) for text in texts]
        # The first part of a text is kept as it is, the others without the blank before them.
        firsts = list({parts[0] for parts in cut})
        words = self._words
        new = list({word for parts in cut for word in parts[1:] if word not in words})
        found = self._encode_whole([*firsts, *(f" {word}" for word in new)])
        first_ids = dict(zip(firsts, found, strict=False))
        new_ids = dict(zip(new, found[len(firsts) :], strict=True))
        if len(words) + len(new) <= _MOST_PARTS:
            words.update((word, ids) for word, ids in new_ids.items() if len(word) <= _LONGEST_PART)
        joined = []
        for parts in cut:
            ids = list(first_ids[parts[0]])
            for word in parts[1:]:
                ids += words.get(word) or new_ids[word]
            joined.append(ids)
        return joined

    @property
    def bos_ids(self) -> list[int]:
        """The beginning-of-sequence token, if the tokenizer is one that puts it before texts; else nothing."""
        bos, tokenizer = self._tokenizer.bos_token_id, self._tokenizer
        adds = isinstance(tokenizer, PreTrainedTokenizerFast) and tokenizer.add_bos_token
        return [bos] if adds and isinstance(bos, int) else []


def splits_at_blanks(backend: Mapping[str, Any]) -> bool:
    """Whether a tokenizer is known to begin a piece at each blank that stands before a visible character.

    Args:
        backend: the tokenizer as `tokenizers` writes it as JSON.
    """
    if any(
        " " in token["content"] or token["lstrip"] or token["rstrip"] or token["single_word"]
        for token in backend["added_tokens"]
    ):
        return False
    if backend["model"]["type"] != "BPE" or backend["model"].get("dropout"):
        return False
    if (backend["normalizer"] or {"type": "NFC"})["type"] != "NFC":  # composes nothing with a blank
        return False
    return _begins_pieces_at_blanks(backend["pre_tokenizer"])


def _begins_pieces_at_blanks(pre_tokenizer: Mapping[str, Any] | None) -> bool:
    if pre_tokenizer is None:
        return False
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    if steps and steps[0]["type"] == "Digits":
        steps = steps[1:]
    match steps:
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return True
        case [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ]:
            return pattern in _SPLITS
        case _:
            return False
