"""Tokenising many texts at once, each different text once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerFast

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextTokenizer:
    """Token ids of texts, without special tokens around them; equal to `tokenizer.encode` of each text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._backend = None
        if isinstance(tokenizer, PreTrainedTokenizerFast):
            tokenizer.encode("", add_special_tokens=False)  # settles truncation, padding and special-token splitting
            self._backend = tokenizer.backend_tokenizer

    def encode(self, texts: Iterable[str]) -> dict[str, list[int]]:
        """The token ids of each different text."""
        unique = list(dict.fromkeys(texts))
        if not unique:
            return {}
        if self._backend is not None:
            found = self._backend.encode_batch_fast(unique, add_special_tokens=False)
            return {text: encoding.ids for text, encoding in zip(unique, found, strict=True)}
        found = self._tokenizer(unique, add_special_tokens=False)["input_ids"]
        return dict(zip(unique, found, strict=True))

    @property
    def bos_ids(self) -> list[int]:
        """The beginning-of-sequence token, if the tokenizer is one that puts it before texts; else nothing."""
        bos, tokenizer = self._tokenizer.bos_token_id, self._tokenizer
        adds = isinstance(tokenizer, PreTrainedTokenizerFast) and tokenizer.add_bos_token
        return [bos] if adds and isinstance(bos, int) else []
