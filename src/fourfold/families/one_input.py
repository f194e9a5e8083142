"""Layers of one module that families call with the same tensor."""

from __future__ import annotations

OF_ONE_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of such layers, in the order in which the families that name them so call them."""
