"""Which families can share matrices, and what Transformers' plan of how leaves out, by patterns of parameter names."""

from __future__ import annotations

import re
from typing import Any

GATHERS = "colwise_gather_output"
"""Style of a matrix whose results ranks put together, since what follows needs all of them."""
ROUTES = "routes"
"""Style of a router that is no part of its experts' region: all ranks choose alike, for all positions."""
LINEAR_STYLES = ("colwise", GATHERS, "rowwise", "rowwise_split_input")

TENSOR_FAMILIES = (
    "apertus", "arcee", "cohere", "cohere2", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5", "ernie4_5_moe",
    "exaone", "exaone4", "exaone_moe", "gemma", "gemma2", "gemma3_text", "gemma4_text", "glm", "glm4", "glm4_moe",
    "glm4_moe_lite", "gpt_oss", "granite", "granitemoe", "granitemoeshared", "helium", "hunyuan_v1_dense",
    "hunyuan_v1_moe", "hy_v3", "internlm3", "llama", "mimo_v2_flash", "minimax_m2", "ministral", "ministral3",
    "mistral", "mixtral", "nanochat", "olmo2", "olmo3", "olmoe", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe",
    "seed_oss", "smollm3", "starcoder2",
)  # fmt: skip
"""Families that train the same whether their matrices are shared or not; each is tested."""

_LAYER = "model.layers.*."
_ATTENTION = {
    **{f"{_LAYER}self_attn.{name}": "colwise" for name in ("q_proj", "k_proj", "v_proj")},
    f"{_LAYER}self_attn.o_proj": "rowwise",
}


def _gated(path: str) -> dict[str, str]:
    """Of an MLP with a gate."""
    return {
        f"{_LAYER}{path}.gate_proj": "colwise",
        f"{_LAYER}{path}.up_proj": "colwise",
        f"{_LAYER}{path}.down_proj": "rowwise",
    }


_ADDED: dict[str, dict[str, str]] = {
    "exaone_moe": _gated("mlp.shared_experts"),
    "glm4_moe_lite": _gated("mlp.shared_experts"),
    "gemma4_text": {f"{_LAYER}router": ROUTES},
    "gpt_oss": {**_ATTENTION, f"{_LAYER}self_attn.sinks": "colwise"},
    "granitemoe": _ATTENTION,
    "granitemoeshared": _ATTENTION,
    "hunyuan_v1_dense": _ATTENTION | _gated("mlp"),
    "hunyuan_v1_moe": _ATTENTION | _gated("mlp.shared_mlp"),
    "qwen2_moe": _gated("mlp.shared_expert"),
}
"""Family -> pattern -> style."""


def styles_of(model: Any) -> list[tuple[re.Pattern[str], str]]:
    """Transformers' plan with what it leaves out, as patterns of full names, and the styles of what has such a name.

    Args:
        model: a PreTrainedModel; wrappers may add a prefix to its names.
    """
    plan = {**(model.tp_plan or {}), **_ADDED.get(model.config.get_text_config().model_type, {})}
    return [(re.compile(re.escape(name).replace(r"\*", r"[^.]+")), style) for name, style in plan.items()]
