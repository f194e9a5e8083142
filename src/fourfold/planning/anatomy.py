"""What a model is made of, and what training it would hold on one device: the first part of a plan's report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fourfold.base.units import GIB
from fourfold.planning.held import held_by
from fourfold.planning.layout import Layout
from fourfold.planning.search import Plan
from fourfold.planning.shape import Kind, Weight


@dataclass(frozen=True, slots=True)
class Anatomy:
    """Sizes of a model and of a job with it, nothing split and nothing computed again.

    Attributes:
        layers: decoder layers.
        parameters, active, trained: numbers of the model, of what a token is multiplied with, of what is trained.
        by_kind: parameters of each kind that there is.
        largest_layer: parameters of the largest decoder layer.
        outer: parameters outside the layers: embedding, last norm, head.
        largest_matrix: the parameter that has it.
        bytes_of: parameters, gradients, optimizer, activations (of a micro-batch) and logits.
        micro_batch: positions of the micro-batch that is meant.
    """

    layers: int
    parameters: int
    active: int
    trained: int
    by_kind: dict[Kind, int]
    largest_layer: int
    outer: int
    largest_matrix: Weight
    bytes_of: dict[str, int]
    micro_batch: int

    def as_json(self) -> dict[str, Any]:
        """`anatomy` of `fourfold plan --json`."""
        matrix = self.largest_matrix
        return {
            "layers": self.layers,
            "parameters": self.parameters,
            "active_parameters": self.active,
            "trained_parameters": self.trained,
            "trained_share": self.trained / self.parameters,
            "parameters_by_kind": dict(self.by_kind),
            "largest_layer": self.largest_layer,
            "largest_matrix": {"name": matrix.name, "shape": list(matrix.shape), "parameters": matrix.largest_matrix},
            "memory_gib": {name: size / GIB for name, size in self.bytes_of.items()},
            "micro_batch": self.micro_batch,
        }


def anatomy_of(plan: Plan) -> Anatomy:
    """The anatomy of a plan's model and job."""
    shape, job, terms = plan.shape, plan.job, plan.single.terms
    held = held_by(shape, job, Layout())
    sizes = {"parameters": held.parameters, "gradients": held.gradients, "optimizer": held.optimizer}
    sizes |= {name: terms.get(name, 0) for name in ("activations", "logits")}
    return Anatomy(
        layers=shape.num_layers,
        parameters=shape.numel,
        active=shape.active,
        trained=held.trained,
        by_kind=shape.by_kind,
        largest_layer=shape.largest_layer,
        outer=sum(weight.numel for weight in shape.outer),
        largest_matrix=shape.largest_matrix,
        bytes_of=sizes,
        micro_batch=job.micro_batch,
    )
