"""What a rank holds from step to step: weights, gradients and optimizer state, whatever moment its peak is at."""

from __future__ import annotations

from dataclasses import dataclass

from fourfold.planning.job import Job
from fourfold.planning.layout import Layout
from fourfold.planning.shape import ModelShape
from fourfold.planning.states import layer_part, optimizer_bytes, outer_part, stage_of


@dataclass(frozen=True, slots=True)
class Held:
    """State of one rank.

    Attributes:
        trained: numbers that are trained.
        parameters: bytes, with the constants of packed weights.
        gradients: bytes, all of them there.
        optimizer: bytes, on the device or the host.
    """

    trained: int
    parameters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """Bytes of all."""
        return self.parameters + self.gradients + self.optimizer


def held_by(shape: ModelShape, job: Job, layout: Layout, rank: int = 0) -> Held:
    """What a rank of the pipeline holds; of the whole model where nothing is split."""
    stage = stage_of(shape, job, layout, rank)
    weights = trained = 0
    for counts, trainable in zip(stage.counts, stage.trained, strict=True):
        for kind, count, whole in zip(shape.kinds, counts, trainable, strict=True):
            for number, is_trained in ((whole, True), (count - whole, False)):
                if number:
                    part = layer_part(shape, job, layout, kind, trained=is_trained)
                    weights += number * (part.weights + part.scales)
                    trained += number * part.trained
    outer = outer_part(shape, job, layout, stage)
    weights, trained = weights + outer.weights + outer.scales, trained + outer.trained
    return Held(trained, weights, trained * job.master_bytes, optimizer_bytes(job, trained))
