"""Tiny random models of every family and a tiny tokenizer: complete model folders of well under a megabyte.

`save_tiny_model(folder)` writes what a user would point `model_name_or_path` at: config, weights, tokenizer with a
chat template.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from fourfold.config.model import ModelConfig

Load = Callable[..., tuple[PreTrainedModel, ModelConfig]]
"""Loads a tiny model with further config keys; see the fixture `load` of the tests of models."""

Logits = Callable[[nn.Module], Tensor]
"""Logits of a model on fixed tokens."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCAB_SIZE = 384
"""Rows of the embedding: 256 bytes, three special tokens, merges, and some rows without a token, as real models have.
Divides among up to 128 ranks."""

_TEXT = [
    "Hello, I am an assistant. What can I do for you today?",
    "The quick brown fox jumps over the lazy dog, and the dog does not care.",
    "system user assistant: who are you? I am a tiny model that was made for tests.",
]

_DENSE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "output_router_logits": False}

_ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 4,
}
_SCALED = {
    "embedding_multiplier": 4.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.25,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 16},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen2": {},
    "qwen3": {"tie_word_embeddings": True},
    "qwen3_moe": {"num_experts": 4, **_EXPERTS, "decoder_sparse_step": 1, "norm_topk_prob": True},
    "gemma2": {"sliding_window": 16, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 16, "query_pre_attn_scalar": 8},
    "phi3": {"sliding_window": None},
    "olmo": {"clip_qkv": 0.5},
    "olmo2": {},
    "granite": _SCALED,
    "glm4": {"partial_rotary_factor": 0.5},
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "deepseek_v3": {**_ROUTED, **_LATENT},
    "cohere2": {"sliding_window": 16, "logit_scale": 0.25},
    "starcoder2": {"sliding_window": None},
    "smollm3": {"no_rope_layer_interval": 2},
}
"""Every family that is tested, with what its config needs beside the common numbers."""

_SLIDING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
_PART_DENSE = {"mlp_layer_types": ["dense", "sparse"]}
FURTHER_FAMILIES: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "cohere": {"logit_scale": 0.25},
    "deepseek_v2": {**_ROUTED, **_LATENT, "topk_method": "group_limited_greedy"},
    "dots1": {**_ROUTED, "layer_types": ["full_attention", "full_attention"]},
    "ernie4_5": {},
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 16,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 1,
    },
    "exaone": {},
    "exaone4": _SLIDING,
    "exaone_moe": {
        "num_experts": 4,
        **_EXPERTS,
        "num_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        **_SLIDING,
        **_PART_DENSE,
    },
    "gemma": {},
    "gemma4_text": {
        "vocab_size_per_layer_input": VOCAB_SIZE,
        "hidden_size_per_layer_input": 8,
        "global_head_dim": 16,
        "num_hidden_layers": 4,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
    },
    "glm": {},
    "glm4_moe": {**_ROUTED, "partial_rotary_factor": 0.5, "use_qk_norm": True},
    "glm4_moe_lite": {**_ROUTED, **_LATENT, **_PART_DENSE},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2, **_SCALED},
    "granitemoeshared": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 16,
        **_SCALED,
    },
    "helium": {},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "hy_v3": {"num_experts": 4, **_EXPERTS, "num_shared_experts": 1, **_PART_DENSE},
    "internlm3": {},
    "mimo_v2_flash": {
        "n_routed_experts": 4,
        **_EXPERTS,
        "n_group": 1,
        "topk_group": 1,
        "v_head_dim": 8,
        "sliding_window": 16,
        "layer_types": ["full_attention", "sliding_attention"],
        **_PART_DENSE,
    },
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "ministral": {"sliding_window": 16, "layer_types": ["sliding_attention", "sliding_attention"]},
    "ministral3": {"sliding_window": 16},
    "nanochat": {},
    "olmo3": _SLIDING,
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 4, **_EXPERTS, "shared_expert_intermediate_size": 16},
    "seed_oss": {"attention_dropout": 0.0, "residual_dropout": 0.0},
}
"""Families that are tested in what differs between families, each but for what this version of Transformers lacks."""
FURTHER_FAMILIES = {name: config for name, config in FURTHER_FAMILIES.items() if name in CONFIG_MAPPING}
FURTHER_EXPERTS = tuple(
    name for name, config in FURTHER_FAMILIES.items() if any("experts" in entry for entry in config)
)
"""Those of them with experts."""

_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
OTHER_FAMILIES: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("bloom", "falcon", "gpt_neox", "phi", "stablelm")},
    **dict.fromkeys(("gpt2", "gpt_bigcode"), _NO_DROPOUT),
    **{name: {**_NO_DROPOUT, "rotary_dim": 4} for name in ("codegen", "gptj")},
    "opt": {"dropout": 0.0},
    "doge": {},
    **{
        name: {**_ROUTED, **_LATENT, **_PART_DENSE, "index_n_heads": 32, "index_head_dim": 8, "index_topk": 8}
        for name in ("deepseek_v32", "glm_moe_dsa")
    },
}
OTHER_FAMILIES = {name: config for name, config in OTHER_FAMILIES.items() if name in CONFIG_MAPPING}
"""Families of other forward passes, which are trained, and sharded."""

_DELTA_NET = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "num_hidden_layers": 4,
}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_d_conv": 4}
_CONVOLUTIONS = {"layer_types": ["conv", "full_attention"]}
HYBRIDS: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64},
    "granitemoehybrid": {
        **_MAMBA,
        "num_local_experts": 0,
        "shared_intermediate_size": 48,
        "layer_types": ["mamba", "attention"],
    },
    "lfm2": _CONVOLUTIONS,
    "lfm2_moe": {"num_experts": 4, **_EXPERTS, "num_dense_layers": 1, **_CONVOLUTIONS},
    "olmo_hybrid": _DELTA_NET,
    "qwen3_5_moe_text": {"num_experts": 4, **_EXPERTS, "shared_expert_intermediate_size": 16, **_DELTA_NET},
    "qwen3_5_text": _DELTA_NET,
    "qwen3_next": {"num_experts": 4, **_EXPERTS, "shared_expert_intermediate_size": 16, **_DELTA_NET},
}
"""Families with layers that carry a state along a row, beside attention."""

EVERY_FAMILY = FAMILIES | HYBRIDS | FURTHER_FAMILIES | OTHER_FAMILIES

MOE_FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3")


SMALL_SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 4096,
}
"""Overrides for models whose memory is compared with a prediction: large enough that what is small does not count."""


def tiny_config(model_type: str = "llama", **overrides: Any) -> PreTrainedConfig:
    """A config of a few ten thousand parameters; `overrides` are entries of that config."""
    entries = {**_DENSE, **EVERY_FAMILY[model_type], **overrides}
    if model_type == "falcon":
        del entries["head_dim"]  # which it says itself
    return AutoConfig.for_model(model_type, **entries)


def tiny_model(model_type: str = "llama", *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A model of `tiny_config` with random weights, fp32, in evaluation mode.

    The weights are larger than usual, so that logits differ visibly between positions and tokens.
    """
    torch.manual_seed(seed)
    config = tiny_config(model_type, **{"initializer_range": 0.2, **overrides})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def quantize(model: PreTrainedModel, *, double: bool = False) -> None:
    """Pack the linear layers of every decoder layer into bitsandbytes' nf4, in place, to be computed in fp32.

    Args:
        double: quantise the scales, too.
    """
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    head = model.get_output_embeddings()
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, nn.Linear) or layer is head:
            continue
        packed = Linear4bit(
            layer.in_features, layer.out_features, layer.bias is not None, torch.float32, double, "nf4", torch.uint8
        )
        make: Any = Params4bit
        packed.weight = make(
            layer.weight.data, requires_grad=False, compress_statistics=double, quant_type="nf4", module=packed
        ).to("cpu")
        packed.bias = layer.bias
        packed.support_avx512bf16_for_cpu = False
        model.set_submodule(name, packed)
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most VOCAB_SIZE tokens with ChatML's special tokens and template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def save_tiny_model(
    folder: Path,
    model_type: str = "llama",
    *,
    tokenizer: PreTrainedTokenizerFast | None = None,
    seed: int = 0,
    **overrides: Any,
) -> Path:
    """Write a complete model folder and return it; the tokenizer is `tiny_tokenizer()` unless given."""
    tiny_model(model_type, seed=seed, **overrides).save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return folder
