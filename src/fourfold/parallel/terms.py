"""Sums with named denominators, and the one division that turns them into a loss.

An objective never returns a mean: it returns sums over what its batch holds, each with the name of the quantity
it is to be divided by. Denominators are counted over the whole optimizer step (all micro-batches, all
data-parallel ranks) before the first backward, so loss and gradient do not depend on how the step was cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

TARGETS = "targets"
"""Denominator: the summed weight of all trained positions of the step."""

TARGET_COUNT = "target_count"
"""Denominator: the number of trained positions of the step, whatever their weight."""

TOKENS = "tokens"
"""Denominator: the number of input tokens of the step, padding left out."""


@dataclass(frozen=True, slots=True)
class Term:
    """A sum over one micro-batch and the name of its denominator.

    Attributes:
        total: scalar tensor, fp32; summed, not averaged.
        denominator: name of the quantity the sum is divided by.
    """

    total: Tensor
    denominator: str


@dataclass(frozen=True, slots=True)
class LossTerms:
    """What an objective returns for one micro-batch.

    Attributes:
        terms: parts of the loss by name; their quotients add up to the loss that is differentiated.
        metrics: further sums to report, detached.
    """

    terms: Mapping[str, Term]
    metrics: Mapping[str, Term] = field(default_factory=dict)
