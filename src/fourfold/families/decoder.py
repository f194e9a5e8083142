"""Where a causal language model has its decoder, and a decoder its embedding, layers and norm."""

from __future__ import annotations

from typing import Any

_CUT_AS_USUAL = frozenset(
    ("granitemoe", "granitemoeshared", "hunyuan_v1_dense", "hunyuan_v1_moe", "olmoe"),
)
"""Families that Transformers has no plan for, whose decoders are embedding, layers and norm all the same; each is
tested."""
_HAND_ON_MORE = frozenset({"glm_moe_dsa", "hy_v4"})
"""Families whose layers hand on more than hidden states: which positions the next ones look at."""


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

    So many see each other in phimoe, too, whose mask alone has a window (Transformers 5.17 and 5.24).

    Args:
        config: a PreTrainedConfig, of the text model.
    """
    if config.model_type == "phimoe":
        return config.sliding_window
    kinds = getattr(config, "layer_types", None) or ()
    return getattr(config, "attention_chunk_size", None) if "chunked_attention" in kinds else None


def heads_by_layer(config: Any) -> list[tuple[int, int]]:
    """Key heads and the size of a head, of each decoder layer where they differ (gemma4); empty elsewhere.

    Args:
        config: a PreTrainedConfig, of the text model.
    """
    of_layer = getattr(config, "per_layer_config", None)
    if of_layer is None:
        return []
    layers = [of_layer[number] for number in range(config.num_hidden_layers)]
    found = [(getattr(layer, "num_key_value_heads", 0), getattr(layer, "head_dim", 0)) for layer in layers]
    return found if len(set(found)) > 1 else []


def key_heads_of(config: Any) -> tuple[int, ...]:
    """The numbers of key heads that a decoder's layers have, each once.

    Args:
        config: a PreTrainedConfig, of the text model.
    """
    own = config.to_dict().get("num_key_value_heads") or config.num_attention_heads
    return tuple(sorted({own, *(count for count, _ in heads_by_layer(config))}))


def stage_names(decoder: Any) -> tuple[str, str, str] | None:
    """The names of embedding, layers and norm in a decoder, from the family's own pipeline plan.

    Args:
        decoder: a PreTrainedModel without a head.

    Returns:
        None where the family has no plan, one of more parts, or one that does not do.
    """
    if decoder.config.model_type in _HAND_ON_MORE:
        return None
    names = tuple(getattr(decoder.config, "base_model_pp_plan", None) or ())
    if not names and decoder.config.model_type in _CUT_AS_USUAL:
        names = ("embed_tokens", "layers", "norm")
    if len(names) != 3 or not hasattr(getattr(decoder, names[1], None), "__len__"):  # a list of layers
        return None
    return names
