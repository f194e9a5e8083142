"""Which families can share matrices, and what Transformers' plan of how leaves out, by patterns of parameter names."""

from __future__ import annotations

TENSOR_FAMILIES = (
    "cohere2", "deepseek_v3", "gemma2", "gemma3_text", "glm4", "gpt_oss", "granite", "llama", "mistral", "mixtral",
    "olmo2", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3", "starcoder2",
)  # fmt: skip
"""Families that train the same whether their matrices are shared or not; each is tested."""

_ATTENTION = "model.layers.*.self_attn."

ADDED_STYLES: dict[str, dict[str, str]] = {
    "gpt_oss": {
        **{_ATTENTION + name: "colwise" for name in ("q_proj", "k_proj", "v_proj", "sinks")},
        _ATTENTION + "o_proj": "rowwise",
    }
}
"""Family -> pattern -> style."""
