"""Loading a tokenizer, from the hub, a folder or a GGUF file."""

from __future__ import annotations

from pathlib import Path

import yaml
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fourfold.base.errors import ConfigError, ModelError
from fourfold.base.log import get_logger
from fourfold.config.model import ModelConfig
from fourfold.models.gguf_tokenizer import load_gguf_tokenizer
from fourfold.models.source import explained, gguf_path, hub_options, model_name

log = get_logger(__name__)


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of the model, from the hub, a folder or a GGUF file, with the config's tokens added.

    It pads on the right (generation pads on the left by itself) and always has a pad token.

    Raises:
        ModelError: it cannot be loaded, or has neither a pad nor an end-of-sequence token.
    """
    name = model_name(config)
    path = gguf_path(name)
    if path is not None:
        tokenizer = load_gguf_tokenizer(path)
    else:
        with explained(name, "the tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(name, use_fast=config.use_fast_tokenizer, **hub_options(config))
    tokenizer.padding_side = "right"
    # Sequences are cut to cutoff_len and checked against the model's context here; the library's own remark on a long
    # text comes before that and says nothing to settle.
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    tokenizer.split_special_tokens = config.split_special_tokens
    _add_tokens(tokenizer, config)
    _ensure_pad(tokenizer, name)
    return tokenizer


def _add_tokens(tokenizer: PreTrainedTokenizerBase, config: ModelConfig) -> None:
    special = (*config.add_special_tokens, *described_tokens(config))
    for tokens, are_special in ((config.add_tokens, False), (special, True)):
        if tokens:
            added = tokenizer.add_tokens(list(tokens), special_tokens=are_special)
            log.info("Added %d tokens to the vocabulary: %s.", added, ", ".join(tokens))


def _ensure_pad(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    if tokenizer.pad_token_id is not None:
        return
    if tokenizer.eos_token is None:
        raise ModelError(
            f"model_name_or_path: the tokenizer of {name} has neither a pad nor an end-of-sequence token. "
            "Set one of them in its tokenizer_config.json."
        )
    tokenizer.pad_token = tokenizer.eos_token
    log.info("The tokenizer has no pad token; %s is used.", tokenizer.eos_token)


def described_tokens(config: ModelConfig) -> dict[str, str]:
    """New special tokens and what they mean, from the YAML file that `new_special_tokens_config` names.

    Raises:
        ConfigError: the file is missing or is no mapping of tokens to text.
    """
    if config.new_special_tokens_config is None:
        return {}
    path = Path(config.new_special_tokens_config)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"new_special_tokens_config: {path} cannot be read ({error}). Give a YAML file.") from error
    if not isinstance(content, dict) or not all(isinstance(item, str) for pair in content.items() for item in pair):
        raise ConfigError(
            f"new_special_tokens_config: {path} must map each token to a text that describes it, one a line."
        )
    return content
