"""Which architectures cannot share the positions of a row over ranks, told from their Transformers config alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fourfold.families.decoder import chunk_of
from fourfold.families.recurrent import carries_state

_MAKE_MASKS = frozenset(
    (
        *("axk2", "deepseek_v32", "deepseek_v4", "doge", "dots3_note", "dots3_note_text", "glm5_next_text"),
        *("glm_moe_dsa", "hy_v4", "minimax_m3_vl_text", "qwen4_exp", "qwen4_exp_text"),
    )
)
"""Model types of which some layers choose by what is at a position who sees it, in a mask of their own (Transformers
5.17 and 5.24)."""


def is_exchangeable(config: Any, model_class: Any) -> bool:
    """Whether a model's layers can run an attention of our own: all take theirs from Transformers' interface and leave
    it to the interface who sees whom, and none carries a recurrent state across positions.

    Args:
        config: a PreTrainedConfig.
        model_class: the PreTrainedModel that is built from it.
    """
    takes_any = bool(model_class._supports_attention_backend) and config.model_type not in _MAKE_MASKS
    return takes_any and not carries_state(config, model_class)


def has_fused_scores(config: Any) -> bool:
    """Whether a kernel can make attention's scores, which knows no dropout of them; soft caps (gemma 2) not every one.

    Args:
        config: a PreTrainedConfig, of the text model.
    """
    return not getattr(config, "attention_dropout", 0.0)


def caps_scores(config: Any) -> bool:
    """Whether attention scores are soft-capped (gemma 2).

    Args:
        config: a PreTrainedConfig, of the text model.
    """
    return bool(getattr(config, "attn_logit_softcapping", None))


def position_obstacles(config: Any, model_class: Any) -> Iterator[str]:
    """Why the positions of a model's rows cannot be shared by ranks, whatever the method; nothing if they can.

    Args:
        config: a PreTrainedConfig, of the text model.
        model_class: the PreTrainedModel that is built from it; None if there is none.
    """
    if model_class is None or not is_exchangeable(config, model_class):
        yield f"a {config.model_type} model does not take its attention from Transformers' interface in every layer"
    if chunk_of(config):
        yield "some of its layers attend within chunks of a row"
    scaling: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    kinds = {p.get("rope_type") for p in (scaling, *scaling.values()) if isinstance(p, dict)}
    if kinds & {"dynamic", "longrope"}:
        yield CHANGING_ROTATION


CHANGING_ROTATION = (
    "its rotary embedding (rope_type dynamic or longrope) changes with the longest position of a whole row"
)
"""Why such a rotary embedding is refused: a rank sees some positions only."""
