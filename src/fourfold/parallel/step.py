"""One optimizer step's forward and backward: the only place where sums are divided by their denominators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from fourfold.dataset.batch import Batch
from fourfold.parallel.loss import Outputs
from fourfold.parallel.reduce import total_denominators
from fourfold.parallel.terms import LossTerms, Term


class LossFunction(Protocol):
    """The two calls of an objective that a step needs (objectives/interface.py)."""

    def denominators(self, batches: Sequence[Batch]) -> dict[str, float]: ...

    def loss(self, outputs: Outputs, batch: Batch) -> LossTerms: ...


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step found out; every figure is a global one.

    Attributes:
        terms: parts of the loss by name, already divided.
        metrics: further quotients to report.
        denominators: what they were divided by, by name.
        denominator_of: for each term and metric the name of its denominator.
        num_tokens: input tokens without padding.
    """

    terms: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    denominators: dict[str, float] = field(default_factory=dict)
    denominator_of: dict[str, str] = field(default_factory=dict)
    num_tokens: int = 0

    @property
    def loss(self) -> float:
        """The sum of the terms: what was differentiated."""
        return sum(self.terms.values())


@dataclass(frozen=True)
class Step:
    """Runs a model on the micro-batches of one optimizer step.

    Attributes:
        model: micro-batch on the device -> outputs.
        objective: outputs -> sums.
        device: where batches are moved to.
        autocast: context of the forward pass (a fresh one for each call).
        scale: factor on the loss before backward (the gradient scaler's under fp16), None for 1.
    """

    model: Callable[[Batch], Outputs]
    objective: LossFunction
    device: torch.device
    autocast: Callable[[], AbstractContextManager[object]]
    scale: Callable[[Tensor], Tensor] | None = None

    def forward_backward(
        self,
        batches: Sequence[Batch],
        *,
        before: Callable[[int], None] | None = None,
    ) -> StepResult:
        """Accumulate the gradient of the whole step's loss.

        Args:
            batches: micro-batches, on the host.
            before: called with its number before each micro-batch (seeds the randomness).
        """
        denominators = total_denominators(self.objective.denominators(batches))
        sums = _Sums()
        for number, batch in enumerate(batches):
            if before is not None:
                before(number)
            on_device = batch.to(self.device)
            with self.autocast():
                found = self.objective.loss(self.model(on_device), on_device)
            loss = torch.stack([_quotient(term, denominators) for term in found.terms.values()]).sum()
            (loss if self.scale is None else self.scale(loss)).backward()
            sums.add(found)
        return sums.result(denominators, batches)

    @torch.no_grad()
    def forward(self, batches: Sequence[Batch]) -> StepResult:
        """The same figures without a gradient, for evaluation."""
        denominators = total_denominators(self.objective.denominators(batches))
        sums = _Sums()
        for batch in batches:
            on_device = batch.to(self.device)
            with self.autocast():
                sums.add(self.objective.loss(self.model(on_device), on_device))
        return sums.result(denominators, batches)


def _quotient(term: Term, denominators: dict[str, float]) -> Tensor:
    # A step without a single target has the sum 0; it is left at 0 instead of 0 / 0.
    return term.total / max(denominators[term.denominator], 1e-12)


class _Sums:
    """Adds up detached sums over micro-batches; read once, at the end, so that a device is not waited for."""

    def __init__(self) -> None:
        self._terms: dict[str, Term] = {}
        self._metrics: dict[str, Term] = {}

    def add(self, found: LossTerms) -> None:
        for into, new in ((self._terms, found.terms), (self._metrics, found.metrics)):
            for name, term in new.items():
                total = term.total.detach()
                if name in into:
                    total = into[name].total + total
                into[name] = Term(total, term.denominator)

    def result(self, denominators: dict[str, float], batches: Sequence[Batch]) -> StepResult:
        return StepResult(
            terms={name: float(_quotient(term, denominators)) for name, term in self._terms.items()},
            metrics={name: float(_quotient(term, denominators)) for name, term in self._metrics.items()},
            denominators=denominators,
            denominator_of={n: term.denominator for n, term in {**self._terms, **self._metrics}.items()},
            num_tokens=sum(batch.num_tokens for batch in batches),
        )
