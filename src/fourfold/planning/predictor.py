"""Predictions of one job on one cluster, each made once, and the forms that a layout may take."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from fourfold.planning.cost import estimate_cost
from fourfold.planning.engines import engine_of
from fourfold.planning.estimate import Cost, Memory
from fourfold.planning.hardware import Cluster
from fourfold.planning.job import RECOMPUTES, EngineName, Job, Recompute
from fourfold.planning.keeps import NOTHING, Keeps
from fourfold.planning.layout import Layout
from fourfold.planning.memory import estimate_memory
from fourfold.planning.shape import ModelShape
from fourfold.planning.wishes import Wishes

_COMPILED_RECOMPUTES: tuple[Recompute, ...] = ("none", "full")


@dataclass(frozen=True, slots=True)
class Form:
    """A layout with the choices that change no result: what one prediction is made for.

    Attributes:
        keeps: what is kept since there is room.
    """

    layout: Layout
    recompute: Recompute
    micro_batch: int
    keeps: Keeps = NOTHING


@dataclass(slots=True)
class Predictor:
    """Predictions of one job on one cluster, each made once."""

    shape: ModelShape
    job: Job
    cluster: Cluster
    wishes: Wishes
    _memories: dict[Form, Memory] = field(default_factory=dict)
    _costs: dict[Form, Cost] = field(default_factory=dict)

    def job_of(self, form: Form) -> Job:
        """The job as a form runs it."""
        job = self.wishes.job_of(self.job, form.layout)
        return form.keeps.job(replace(job, engine=self.engine_of(form.layout)))

    def engine_of(self, layout: Layout) -> EngineName:
        """What will run the layers of a layout."""
        wishes = self.wishes
        return engine_of(
            self.shape,
            self.job,
            layout,
            self.cluster.device,
            compiles=wishes.compiles,
            replays=wishes.replays,
        )

    def memory(self, form: Form) -> Memory:
        """Of the most loaded rank."""
        if form not in self._memories:
            job, device = self.job_of(form), self.cluster.device
            arguments = (form.layout, form.recompute, form.micro_batch)
            self._memories[form] = estimate_memory(self.shape, job, *arguments, device=device)
        return self._memories[form]

    def cost(self, form: Form) -> Cost:
        """Of a step."""
        if form not in self._costs:
            job = self.job_of(form)
            arguments = (form.layout, self.cluster, form.recompute, form.micro_batch)
            self._costs[form] = estimate_cost(self.shape, job, *arguments)
        return self._costs[form]

    def micro_batches(self, layout: Layout) -> list[int]:
        """Positions to try for a micro-batch, most first: what the job allows, halves of it, one sequence."""
        job = self.wishes.job_of(self.job, layout)
        sequences = math.ceil(job.sequences_per_step / layout.dp)
        largest = max(min(job.micro_batch, sequences * job.sequence), job.sequence)
        count, sizes = math.ceil(largest / job.sequence), [largest]
        while count > 1:
            count = math.ceil(count / 2)
            sizes.append(count * job.sequence)
        return sorted({size for size in sizes if size <= largest}, reverse=True)

    def leanest(self, layout: Layout) -> Form:
        """The form that needs the least memory."""
        return Form(layout, self._lean_recompute(layout), self.micro_batches(layout)[-1])

    def recomputes(self, layout: Layout) -> tuple[Recompute, ...]:
        """The kinds that may be used, least work first. Under zbv a layer would be computed again for every group of
        its weights, and all of that kept: nothing is, unless it is asked for. A compiled layer does by itself what
        selective does, which is none then."""
        kinds = self.wishes.recomputes
        if "selective" in kinds and self.engine_of(layout) != "eager":
            kinds = _COMPILED_RECOMPUTES if kinds == RECOMPUTES else ("none",)
        if not layout.splits_backward:
            return kinds
        return ("none",) if "none" in kinds else ("full",)

    def _lean_recompute(self, layout: Layout) -> Recompute:
        return self.recomputes(layout)[-1]
