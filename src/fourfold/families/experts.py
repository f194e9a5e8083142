"""What families' configs call the numbers of their experts."""

from __future__ import annotations

from typing import Any

_CHOSEN = ("num_experts_per_tok", "experts_per_token", "moe_topk", "moe_k", "top_k_experts")


def experts_per_token(config: Any) -> int:
    """Experts that a token chooses, in the layer where it chooses most; 0 where a config has no such number.

    Args:
        config: a PreTrainedConfig, of the text model.
    """
    return largest(next((found for name in _CHOSEN if (found := getattr(config, name, None))), 0))


def largest(number: Any) -> int:
    """Of a number that a config may have for each layer (Hunyuan), the largest."""
    return max(number) if isinstance(number, list | tuple) else number
