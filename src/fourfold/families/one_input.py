"""Layers of one module that families call with the same tensor."""

from __future__ import annotations

OF_ONE_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of such layers, in the order in which the families that name them so call them."""

_RANKS = 32


def columns_of_rank(rank: int) -> int:
    """Columns beside a weight for low-rank terms of its input, of so many ranks in all (models/wide_rank.py): filled up
    to a multiple of 32, of 16, 32, 64 and 128 about the fastest (docs/lab-notes.md)."""
    return rank + -rank % _RANKS
