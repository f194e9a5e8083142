"""Tiny models that see, of which Fourfold trains the language model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import CONFIG_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, PreTrainedModel

from tiny_models import tiny_config, tiny_tokenizer

_VISION: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
_QWEN: dict[str, Any] = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
_MROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
_PARTIAL: dict[str, Any] = _MROPE | {"partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]}
_PARTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gemma3": ("gemma3_text", {}, {**_VISION, "image_size": 28, "patch_size": 14}),
    "gemma4": ("gemma4_text", {}, {**_VISION, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 8}),
    "mistral3": ("mistral", {}, {**_VISION, "image_size": 28, "patch_size": 14}),
    "qwen3_5": ("qwen3_5_text", {}, {**_QWEN, "num_position_embeddings": 4}),
    "qwen2_5_vl": ("qwen2", {"rope_parameters": _MROPE}, {**_QWEN, "fullatt_block_indexes": [0]}),
    "qwen3_vl": (
        "qwen3",
        {"rope_parameters": _MROPE},
        {**_QWEN, "num_position_embeddings": 4, "deepstack_visual_indexes": []},
    ),
    "glm4v": ("glm4", {"rope_parameters": _PARTIAL}, {**_QWEN, "image_size": 28}),
    "glm4v_moe": ("glm4_moe", {"rope_parameters": _PARTIAL, "attention_bias": True}, {**_QWEN, "image_size": 28}),
    "smolvlm": ("llama", {}, {**_VISION, "image_size": 28, "patch_size": 14}),
    "llama4": (
        "llama",
        {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 48, "attention_chunk_size": 128},
        {
            **_VISION,
            "image_size": 28,
            "patch_size": 14,
            "projector_input_dim": 16,
            "projector_output_dim": 16,
            "vision_output_dim": 16,
        },
    ),
}
"""By type of the whole: type of the language model, more of its config, and the config of what sees."""
COMPOSITES = tuple(_PARTS)


def composite_model(model_type: str) -> PreTrainedModel:
    """A model that sees, with random weights, fp32, in evaluation mode."""
    torch.manual_seed(0)
    text_type, more, vision = _PARTS[model_type]
    text = tiny_config(text_type).to_dict()
    text = {key: value for key, value in text.items() if key != "model_type"} | more
    whole: Any = CONFIG_MAPPING[model_type]
    config = whole(text_config=text, vision_config=vision, tie_word_embeddings=bool(text["tie_word_embeddings"]))
    model_class: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    return model_class(config).eval()


def save_composite(folder: Path, model_type: str) -> PreTrainedModel:
    """Write a complete folder of such a model, and return the model."""
    model = composite_model(model_type)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text("{}")
    return model


def text_logits(model: PreTrainedModel | PeftModel, ids: Tensor) -> Tensor:
    """Of a model that sees, given text alone: [B, S] int64 -> [B, S, vocabulary]."""
    if model.config.model_type == "llama4":  # Transformers 5.24 asks the language model's outputs for those of pictures
        inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        with torch.no_grad():
            return inner.language_model(input_ids=ids, use_cache=False).logits
    types = {"token_type_ids": torch.zeros_like(ids)} if model.config.model_type == "gemma3" else {}
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **types).logits
