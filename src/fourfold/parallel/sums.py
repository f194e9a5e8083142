"""Sums of a step: collected without waiting for a device, read at its end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fourfold.parallel.terms import LossTerms, Term


def not_zero(denominators: Mapping[str, float]) -> dict[str, float]:
    """What may be divided by: of a step without a single target the sum is 0, and is left at 0 instead of 0 / 0."""
    return {name: max(value, 1e-12) for name, value in denominators.items()}


def detached(found: LossTerms) -> LossTerms:
    """The same sums without what they were made of."""

    def alone(terms: Mapping[str, Term]) -> dict[str, Term]:
        return {name: Term(term.total.detach(), term.denominator) for name, term in terms.items()}

    return LossTerms(alone(found.terms), alone(found.metrics))


@dataclass(frozen=True, slots=True)
class Figure:
    """One sum of this rank, on the host: a term of the loss, or a metric."""

    name: str
    total: float
    denominator: str
    is_term: bool


class Sums:
    """Adds up detached sums over micro-batches; read once, at the end, so that a device is not waited for."""

    def __init__(self) -> None:
        self.terms: dict[str, Term] = {}
        self.metrics: dict[str, Term] = {}

    def add(self, found: LossTerms) -> None:
        """Those of one more micro-batch."""
        for into, new in ((self.terms, found.terms), (self.metrics, found.metrics)):
            for name, term in new.items():
                total = term.total.detach()
                if name in into:
                    total = into[name].total + total
                into[name] = Term(total, term.denominator)

    @staticmethod
    def figures(sums: dict[str, Term], is_term: bool) -> list[Figure]:
        """The sums as numbers."""
        return [Figure(name, float(term.total), term.denominator, is_term) for name, term in sums.items()]
