"""The special tokens that a template needs, settled in the tokenizer once, before anything is rendered."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fourfold.base.errors import ConfigError
from fourfold.base.log import get_logger
from fourfold.dataset.template import Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = get_logger(__name__)

_FALLBACK_EOS = "<|endoftext|>"


def settle_special_tokens(template: Template, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Give the tokenizer the end-of-sequence, padding and stop tokens of the template. Changes `tokenizer`.

    A stop word that replaces the end-of-sequence is the token with which training ends each turn, so that generation
    stops there; the tokenizer that is saved with the model then says so too.

    Returns:
        The tokens that were new to the vocabulary, in the order of their ids; the model's embeddings need a row for
        each (`resize_vocab`).
    Raises:
        ConfigError: the template replaces the end-of-sequence but names no stop word.
    """
    known = set(tokenizer.get_vocab())
    stop_words = list(template.facts.stop_words)
    eos = tokenizer.eos_token
    if template.facts.replace_eos:
        if not stop_words:
            raise ConfigError(f"template: {template.name} has replace_eos but no stop_words. Name the stop word.")
        eos = stop_words.pop(0)
    wanted = str(eos or _FALLBACK_EOS)
    if tokenizer.eos_token != wanted:
        log.info("template: the end-of-sequence token is now %s (was %s).", wanted, tokenizer.eos_token)
        tokenizer.add_special_tokens({"eos_token": wanted})
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if stop_words:
        tokenizer.add_special_tokens({"additional_special_tokens": stop_words}, replace_extra_special_tokens=False)
    return tuple(word for word in dict.fromkeys((wanted, *stop_words)) if word not in known)
