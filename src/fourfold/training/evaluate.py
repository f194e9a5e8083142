"""Evaluation: the objective's figures over a data set, without gradients."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from fourfold.dataset.collate import CutPolicy, cut
from fourfold.dataset.loader import SampleSource
from fourfold.parallel.mesh import Mesh
from fourfold.parallel.step import Running, Step, StepResult


@dataclass(frozen=True)
class Evaluator:
    """Evaluates a model on named data sets.

    Attributes:
        sets: data sets by name; the name "" gives plain `eval_loss`, others `eval_<name>_loss`.
        batch_size: samples of one forward pass of a rank at most.
        mesh: data-parallel ranks share the samples.
    """

    module: nn.Module
    step: Step
    sets: Mapping[str, SampleSource]
    policy: CutPolicy
    batch_size: int
    mesh: Mesh

    def run(self, prefix: str = "eval") -> dict[str, float]:
        """Figures of all sets: loss (over all their tokens, not a mean of batch means), metrics, runtime."""
        was_training = self.module.training
        self.module.eval()
        figures: dict[str, float] = {}
        for name, source in self.sets.items():
            start = time.perf_counter()
            label = f"{prefix}_{name}" if name else prefix
            figures |= {f"{label}_{key}": value for key, value in self._figures(source).items()}
            seconds = time.perf_counter() - start
            figures[f"{label}_runtime"] = round(seconds, 4)
            figures[f"{label}_samples_per_second"] = round(len(source) / seconds, 3)
        self.module.train(was_training)
        return figures

    def _results(self, source: SampleSource) -> Iterator[StepResult]:
        """Of one forward pass after the other, each read once the next one is begun, so that a device has work."""
        ranks = self.mesh.layout.dp
        begun: Running | None = None
        for first in range(0, len(source), self.batch_size * ranks):
            indices = range(first, min(first + self.batch_size * ranks, len(source)))[self.mesh.dp_rank :: ranks]
            last, begun = begun, self.step.begin_forward(cut([source[i] for i in indices], self.policy))
            if last is not None:
                yield last.read()
        if begun is not None:
            yield begun.read()

    def _figures(self, source: SampleSource) -> dict[str, float]:
        sums: dict[str, float] = {}
        weights: dict[str, float] = {}
        terms: set[str] = set()
        for result in self._results(source):
            terms |= result.terms.keys()
            for key, value in {**result.terms, **result.metrics}.items():
                weight = result.denominators[result.denominator_of[key]]
                sums[key] = sums.get(key, 0.0) + value * weight
                weights[key] = weights.get(key, 0.0) + weight
        means = {key: sums[key] / max(weights[key], 1e-12) for key in sums}
        parts = {key: value for key, value in means.items() if key not in terms or len(terms) > 1}
        return {"loss": sum(means[key] for key in terms), **parts}
