"""Room for new tokens in the embedding and the head, and how their rows start."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fourfold.base.errors import ConfigError
from fourfold.base.log import get_logger
from fourfold.config.model import ModelConfig
from fourfold.models.tokenizer import described_tokens

log = get_logger(__name__)

_MULTIPLE = 64
"""The number of rows is rounded up to this, which suits matrix units and ranks."""


def grows_vocabulary(config: ModelConfig) -> bool:
    """Whether the config asks for more tokens than the model has."""
    added = config.add_tokens or config.add_special_tokens or config.new_special_tokens_config
    return config.resize_vocab or bool(added)


@torch.no_grad()
def resize_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: ModelConfig) -> None:
    """Grow the embedding and the head, in place, so that every token has a row; they never shrink.

    New rows start as the mean of the old ones plus noise, so that new tokens are neither likely nor all alike; with
    `desc_init` the rows of described tokens start as the mean over their description's tokens.
    """
    old, wanted = model.get_input_embeddings().get_parameter("weight").shape[0], len(tokenizer)
    descriptions = described_tokens(config) if config.init_special_tokens != "noise_init" else {}
    if wanted > old:
        model.resize_token_embeddings(wanted, pad_to_multiple_of=_MULTIPLE, mean_resizing=False)
        log.info("resize_vocab: the embedding grew from %d to %d rows.", old, model.config.vocab_size)
    else:
        log.info("resize_vocab: the embedding's %d rows hold all %d tokens.", old, wanted)
    head = model.get_output_embeddings()
    layers = [model.get_input_embeddings(), *([] if head is None else [head])]
    for weight in _distinct_weights(layers):
        if wanted > old:
            mean = weight[:old].mean(dim=0, dtype=torch.float32)
            weight[old:] = (mean + _noise(weight[old:])).to(weight.dtype)
        noisy = config.init_special_tokens == "desc_init_w_noise"
        _start_from_descriptions(weight, tokenizer, descriptions, old, noisy=noisy)


def check_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a token that ends or pads a sequence and has no row: a template of another model may have added it.

    Raises:
        ConfigError: names the token.
    """
    rows = model.get_input_embeddings().get_parameter("weight").shape[0]
    ends = ((tokenizer.eos_token, tokenizer.eos_token_id), (tokenizer.pad_token, tokenizer.pad_token_id))
    for token, index in ends:
        if isinstance(index, int) and index >= rows:
            raise ConfigError(
                f"template: needs the token {token}, but this model's embedding has no row for it ({rows} rows, the "
                f"token is number {index}). Use the template of this model (auto takes its own), or add a row with "
                "resize_vocab: true."
            )


def _distinct_weights(layers: list[nn.Module]) -> list[Tensor]:
    """The weights [vocabulary, hidden size] of embedding and head, once if they are tied."""
    weights = {layer.get_parameter("weight").data_ptr(): layer.get_parameter("weight").data for layer in layers}
    return list(weights.values())


def _noise(rows: Tensor) -> Tensor:
    """Normal noise of the rows' shape, with the spread of a freshly made embedding of that width."""
    return torch.randn(rows.shape, device=rows.device) / math.sqrt(rows.shape[-1])


def _start_from_descriptions(
    weight: Tensor, tokenizer: PreTrainedTokenizerBase, descriptions: Mapping[str, str], num_old: int, *, noisy: bool
) -> None:
    for token, text in descriptions.items():
        ids = [i for i in tokenizer(text, add_special_tokens=False)["input_ids"] if i < num_old]
        if not ids:
            continue
        row = weight[ids].mean(dim=0, dtype=torch.float32)
        index = tokenizer.convert_tokens_to_ids(token)
        weight[index] = (row + _noise(row[None])[0] if noisy else row).to(weight.dtype)
