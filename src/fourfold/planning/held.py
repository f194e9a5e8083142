"""What a rank holds from step to step: weights, gradients and optimizer state, whatever moment its peak is at."""

from __future__ import annotations

from dataclasses import dataclass

from fourfold.planning.job import Job
from fourfold.planning.layout import Layout
from fourfold.planning.shape import ModelShape
from fourfold.planning.states import held_part, optimizer_bytes


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
    part = held_part(shape, job, layout, rank)
    gradients = part.trained * job.master_bytes
    return Held(part.trained, part.weights + part.scales, gradients, optimizer_bytes(job, part.trained))
