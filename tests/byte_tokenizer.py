"""A tokenizer without a model: single bytes and the special tokens that a test asks for."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def make_byte_tokenizer(*special: str, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes (ids 0-255), then <BOS> 256, <EOS> 257 and the tokens in `special`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={byte: number for number, byte in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<BOS>", "<EOS>", *special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<BOS>", eos_token="<EOS>", chat_template=chat_template
    )
