"""Sums of a step: collected without waiting for a device, read at its end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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

    def figures(self) -> Callable[[], list[Figure]]:
        """The sums as numbers, terms first; what is returned waits for the device (`numbers_of`)."""
        kinds = ((self.terms, True), (self.metrics, False))
        found = [(name, term, is_term) for terms, is_term in kinds for name, term in terms.items()]
        numbers = numbers_of([term.total for _, term, _ in found])

        def read() -> list[Figure]:
            pairs = zip(found, numbers(), strict=True)
            return [Figure(name, number, term.denominator, is_term) for (name, term, is_term), number in pairs]

        return read


def on_host(found: Tensor) -> Callable[[], Tensor]:
    """Begin to copy a tensor to the host; what is returned waits as that of `numbers_of` does.

    The tensor may be written to from now on.
    """
    if found.device.type != "cuda":
        copy = found.clone()
        return lambda: copy
    target = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
    target.copy_(found, non_blocking=True)
    there = torch.cuda.Event()
    there.record()

    def read() -> Tensor:
        there.synchronize()
        return target

    return read


def numbers_of(scalars: Sequence[Tensor]) -> Callable[[], list[float]]:
    """Begin to fetch scalars from a device.

    What is returned waits until they are there: for what the device had been given before this call, and for nothing
    that it is given later, as reading a tensor would.
    """
    if not scalars or any(scalar.device.type != "cuda" for scalar in scalars):
        return lambda: [float(scalar) for scalar in scalars]
    read = on_host(torch.stack([scalar.double() for scalar in scalars]))
    return lambda: read().tolist()
