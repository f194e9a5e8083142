"""Which model families have layers that carry a state along a row, and where in a decoder layer they keep them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MIXERS: Mapping[str, str] = {
    "bamba": "mamba",
    "falcon_h1": "mamba",
    "granitemoehybrid": "mamba",
    "lfm2": "conv",
    "lfm2_moe": "conv",
    "olmo_hybrid": "linear_attn",
    "qwen3_5_moe_text": "linear_attn",
    "qwen3_5_text": "linear_attn",
    "qwen3_next": "linear_attn",
}
"""By model type, the name of the module that mixes positions in place of attention, or beside it.

Attention itself these families take from Transformers' interface, though not all of their classes say so
(`_supports_attention_backend`). A mixer takes `hidden_states` [B, S, H], whose rows begin without a state, and gives
[B, S, H]; what stands behind a row's end does not reach back into it. (Read in Transformers 5.17 and 5.24.)
"""


def carries_state(config: Any, model_class: Any) -> bool:
    """Whether some of a model's layers carry a state along a row.

    Args:
        config: a PreTrainedConfig.
        model_class: the PreTrainedModel that is built from it.
    """
    kinds = set(getattr(config, "layer_types", None) or [])
    return bool({kind for kind in kinds if "attention" not in kind or "linear" in kind}) or bool(
        model_class._is_stateful
    )
