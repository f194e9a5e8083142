"""Where a causal language model has its decoder."""

from __future__ import annotations

from typing import Any


def decoder_of(model: Any) -> Any:
    """The decoder of a Transformers model with a head: embedding, layers and last norm.

    Llama 4's language model names itself, being a part of a model that sees (Transformers 5.17 and 5.24).

    Args:
        model: a PreTrainedModel.
    """
    found = model.get_decoder()
    return model.get_submodule("model") if found is model else found


def chunk_of(config: Any) -> int | None:
    """Positions of a chunk where some layers attend within chunks of a row (llama4); None where none do.

    Args:
        config: a PreTrainedConfig, of the text model.
    """
    kinds = getattr(config, "layer_types", None) or ()
    return getattr(config, "attention_chunk_size", None) if "chunked_attention" in kinds else None
