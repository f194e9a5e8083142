"""Checkpoints of which a language model is one part, beside what sees: which part it is, and how its tensors are named.

A tensor has three names: in the language model by itself (`model.layers.0.mlp.up_proj.weight`), in Transformers' class
of the whole (`model.language_model.layers.0...`), and in published files, which may keep an older form of the latter
(`language_model.model.layers.0...`). (Read in Transformers 5.17 and 5.24.)
"""

from __future__ import annotations

import re
from typing import Any

from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from fourfold.base.errors import ModelError

_SAME_AS: dict[str, tuple[str, dict[str, Any]]] = {
    "glm4v_moe_text": ("glm4_moe", {"use_qk_norm": False}),
    "glm4v_text": ("glm4", {"attention_bias": True}),
    "qwen2_vl_text": ("qwen2", {}),
    "qwen2_5_vl_text": ("qwen2", {}),
    "qwen3_vl_text": ("qwen3", {}),
    "qwen3_vl_moe_text": ("qwen3_moe", {}),
}
"""Language models without a class of their own that are, on text alone, models of another type, with what their config
does not say: their rotary embedding has three positions, which text has alike."""
_DECODERS = {
    **dict.fromkeys(("idefics2", "idefics3", "smolvlm"), "model.text_model"),
    "llama4": "language_model.model",
}
"""By type of the whole, where the decoder is in Transformers' class."""
_USUAL_DECODER = "model.language_model"
_HEADS = {"llama4": "language_model.lm_head"}
_USUAL_HEAD = "lm_head"
_NAMED_OTHERWISE = frozenset({"blip-2", "instructblip", "instructblipvideo"})
"""Types of wholes in which the language model's tensors have names that `RENAMED` does not know."""

RENAMED = {
    r"^(?:model\.)?(?:language_model|text_model)\.(?:model\.)?lm_head\.": "lm_head.",
    r"^(?:model\.)?(?:language_model|text_model)\.(?:model\.)?": "model.",
}
"""Names of the whole's, by pattern, and what they are in the language model; the first that matches counts."""
_BY_ITSELF = re.compile(r"(lm_head|model\.(layers|embed_tokens|norm))\.")


def is_composite(config: Any) -> bool:
    """Whether a model is more than a language model, of which that part can be run by itself.

    Args:
        config: a PreTrainedConfig.
    """
    return _own_text(config) is not None and text_config(config) is not None


def _own_text(config: Any) -> Any | None:
    """The part's config in that of the whole; None where it is all."""
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING or getattr(config, "auto_map", None):
        return None
    text = config.get_text_config()
    return None if text is config else text


def text_config(config: Any) -> Any | None:
    """The config of the language model by itself; None where Transformers has no class for it.

    Args:
        config: a PreTrainedConfig of any model; one that is a language model is given back.
    """
    text = _own_text(config)
    if text is None:
        return config
    same = _SAME_AS.get(text.model_type)
    if same is not None:
        model_type, more = same
        entries = {"head_dim": text.hidden_size // text.num_attention_heads} | text.to_dict() | more
        rope = entries.pop("rope_parameters", None) or {}
        kept = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
        plain = {"rope_type": "default", "rope_theta": 1e6} | kept
        del entries["model_type"]
        text = CONFIG_MAPPING[model_type](**entries | {"rope_parameters": plain})
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING or config.model_type in _NAMED_OTHERWISE:
        return None
    own_ties = getattr(text, "tie_word_embeddings", False)
    text.tie_word_embeddings = bool(getattr(config, "tie_word_embeddings", own_ties))
    text.dtype = text.dtype or config.dtype
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        text.quantization_config = quantization
    return text


def language_model_of(config: Any) -> Any:
    """The config that is trained: that of the language model, where the model is more than that.

    Raises:
        ModelError: the language model has no class of its own.
    """
    text = text_config(config)
    if text is None:
        raise ModelError(
            f"model_name_or_path: the language model of a {config.model_type} model cannot be run by itself here. Use "
            "a model of text."
        )
    return text


def put_back(config: Any, text: Any) -> None:
    """Let the config of the whole say what has changed in its language model, in place.

    Args:
        text: the config of the language model by itself.
    """
    own = _own_text(config)
    assert own is not None, "the config of a language model has no other"
    if own.model_type in _SAME_AS:
        own.vocab_size = text.vocab_size
    else:
        [name] = [name for name in config.sub_configs if getattr(config, name, None) is own]
        setattr(config, name, text)
    config.tie_word_embeddings = text.tie_word_embeddings
    config.dtype = text.dtype


def name_alone(name: str) -> str | None:
    """Of a tensor in files or in Transformers' class of the whole, the name in the language model by itself.

    Returns:
        None for a tensor of another part.
    """
    for pattern, replacement in RENAMED.items():
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return renamed
    return name if _BY_ITSELF.match(name) else None


def decoder_in_whole(model_type: str) -> str:
    """Where the decoder is in Transformers' class of the whole, e.g. `model.language_model`."""
    return _DECODERS.get(model_type, _USUAL_DECODER)


def name_in_whole(name: str, model_type: str) -> str:
    """Of a tensor in the language model by itself, the name in Transformers' class of the whole.

    Args:
        model_type: of the whole.
    """
    if name.startswith("model."):
        return f"{decoder_in_whole(model_type)}.{name.removeprefix('model.')}"
    return (
        f"{_HEADS.get(model_type, _USUAL_HEAD)}.{name.removeprefix('lm_head.')}"
        if name.startswith("lm_head.")
        else name
    )
