"""How attention's scores are made and turned into weights, whoever computes them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Scores:
    """What a layer asks of its attention.

    Attributes:
        dropout: probability, training only.
        scaling: factor on the scores; None for head_dim ** -0.5.
        sliding_window: how many positions a query sees, itself included; None for all.
        softcap: scores become softcap * tanh(scores / softcap).
        sinks: [heads] one extra logit a head (gpt-oss).
    """

    dropout: float = 0.0
    scaling: float | None = None
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def fused(self) -> bool:
        """Whether torch's attention knows everything that is asked."""
        return self.softcap is None and self.sinks is None

    @property
    def by_flash(self) -> bool:
        """Whether flash attention makes them, which knows sinks by what is done to its result (flash.py)."""
        return self.softcap is None

    def scale(self, head_dim: int) -> float:
        """The factor on the scores."""
        return head_dim**-0.5 if self.scaling is None else self.scaling
