"""What a run's step does beyond running layer after layer: compiled layers, and micro-batches replayed as graphs.

Both are on by default where they are known to give the same losses; what they cannot run, runs as it is. One line says
what was chosen, and why not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fourfold.base.log import get_logger
from fourfold.base.peft import ParamWrapper
from fourfold.config.schema import Run
from fourfold.models.attention import takes_offsets
from fourfold.models.document_rows import has_mixers
from fourfold.models.forward import StepModel
from fourfold.models.unwrap import base_model
from fourfold.parallel.local_experts import takes_rows
from fourfold.parallel.mesh import Mesh
from fourfold.parallel.stacked_experts import has_experts
from fourfold.planning.engines import wants_compiled, why_apart
from fourfold.planning.job import EngineName
from fourfold.training.precision import Precision

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Fast:
    """What a step does, or is wished to do.

    Attributes:
        compiled: decoder layers run compiled.
        graphs: small micro-batches are replayed as CUDA graphs.
        around_experts: of what is compiled, experts are left out.
    """

    compiled: bool = False
    graphs: bool = False
    around_experts: bool = False

    @property
    def engine(self) -> EngineName:
        """What the planner is told of it."""
        if not self.compiled:
            return "eager"
        return "around" if self.around_experts else "replayed" if self.graphs else "compiled"


NOTHING_FAST = Fast()


def wished(run: Run, max_steps: int) -> Fast:
    """What the config asks for; by default what is worth it in a run of so many steps."""
    return Fast(wants_compiled(run.training, max_steps), run.training.cuda_graphs is not False)


def what_goes(wishes: Fast, model: StepModel, mesh: Mesh, precision: Precision, run: Run) -> Fast:
    """Of what is wished, what this model on this mesh can do; told in a line.

    Args:
        model: not yet split.
    """
    if mesh.device.type != "cuda" or not (wishes.compiled or wishes.graphs):
        return NOTHING_FAST
    against = next(_obstacles(model, mesh, precision, run), None)
    compiled = wishes.compiled and against is None
    no_graphs = against or next(_obstacles_of_graphs(model, mesh, run), None)
    graphs = wishes.graphs and no_graphs is None
    alone = _why_experts_are_apart(model, mesh, precision) if compiled else None
    found = Fast(compiled, graphs, around_experts=alone is not None)
    reason = against if wishes.compiled else None
    around = ["around attention, whose positions ranks share"] if compiled and mesh.layout.cp > 1 else []
    if compiled and has_mixers(base_model(model.module)):
        around.append("around what carries a state along a row")
    around += [] if alone is None else [f"around their experts, which run as they are ({alone})"]
    if compiled and model.balance_experts and has_experts(base_model(model.module)):
        around.append("around their routers, whose balance is part of the loss")
    log.info(
        "Layers are %scompiled%s%s; small micro-batches are %sreplayed as CUDA graphs%s",
        "" if compiled else "not ",
        f" {', and '.join(around)}" if around else "",
        "" if reason is None else f" ({reason})",
        "" if graphs else "not ",
        f" ({no_graphs})" if wishes.graphs and no_graphs and no_graphs != against else "",
    )
    return found


def _obstacles(model: StepModel, mesh: Mesh, precision: Precision, run: Run) -> Iterator[str]:
    """Why neither goes."""
    layout, inner = mesh.layout, base_model(model.module)
    if layout.splits_backward:
        yield "zbv makes gradients in two parts"
    if layout.offload != "none" or run.parallel.offload_activations:
        yield "weights or activations travel to the host"
    if not model.packed or not takes_offsets(inner.config.get_text_config(), mesh.device, precision.compute):
        yield "its attention needs more than the documents' offsets"


def _why_experts_are_apart(model: StepModel, mesh: Mesh, precision: Precision) -> str | None:
    inner = base_model(model.module)
    if not has_experts(inner):
        return None
    if any(isinstance(module, ParamWrapper) and not takes_rows(module.get_base_layer()) for module in inner.modules()):
        return "they have adapters that are added to their weights"
    return why_apart(mesh.layout, "bf16" if precision.compute == torch.bfloat16 else "")


def _obstacles_of_graphs(model: StepModel, mesh: Mesh, run: Run) -> Iterator[str]:
    """Why graphs do not go."""
    if mesh.layout.world_size > 1:
        yield "several ranks exchange gradients"
    if run.tuning.finetuning_type != "lora":
        yield "gradients of whole weights would stay for good"
    if has_experts(base_model(model.module)):
        yield "it has experts"
    if has_mixers(base_model(model.module)):
        yield "some of its layers carry a state along a row"
    if not model.has_plain_head:
        yield "its head is not a plain one"
