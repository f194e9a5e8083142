"""A tokenizer of one token a word, with Llama 3's special tokens and size: made-up text has the length asked for.

It stands in for the real one, which lies on a hub: `llama3` renders the same chats to the same number of tokens, and
speed does not depend on which words they are.
"""

from __future__ import annotations

import random
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from made_up_rows import WORDS

SPECIAL = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"),
    "<|finetune_right_pad_id|>",
)
_LINES = "\n\n"
_ROLES = ("system", "user", "assistant")


def word_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of `size` tokens: those that chats need, the words of `made_up_rows`, and numbered words."""
    named = ["<|unknown|>", _LINES, *_ROLES, *WORDS]
    numbered = [f"w{i}" for i in range(size - len(named) - len(SPECIAL))]
    vocabulary = {word: i for i, word in enumerate((*named, *numbered, *SPECIAL))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unknown|>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n\n|[^\s]+"), behavior="removed", invert=True)
    backend.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<|unknown|>",
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        pad_token="<|finetune_right_pad_id|>",
    )


def save_tokenizer(folder: Path, size: int) -> Path:
    """Write such a tokenizer into a folder, if none is there."""
    if not (folder / "tokenizer.json").exists():
        word_tokenizer(size).save_pretrained(folder)
    return folder


def random_text(source: random.Random, words: int, size: int) -> str:
    """So many numbered words of a tokenizer of `size` tokens."""
    numbered = size - len(SPECIAL) - len(WORDS) - len(_ROLES) - 2
    return " ".join(f"w{source.randrange(numbered)}" for _ in range(words))
