"""What Transformers' tensor-parallel plan of a family leaves out, by patterns of parameter names."""

from __future__ import annotations

_ATTENTION = "model.layers.*.self_attn."

ADDED_STYLES: dict[str, dict[str, str]] = {
    "gpt_oss": {
        **{_ATTENTION + name: "colwise" for name in ("q_proj", "k_proj", "v_proj", "sinks")},
        _ATTENTION + "o_proj": "rowwise",
    }
}
"""Family -> pattern -> style."""
