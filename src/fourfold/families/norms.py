"""How families compute their norms."""

from __future__ import annotations

NORMS_IN_FP32 = ("gemma", "gemma2", "gemma3", "gemma3_text", "gemma4_text")
"""Families that multiply with a norm's weight before they leave fp32."""
