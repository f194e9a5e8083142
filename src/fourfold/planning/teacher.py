"""What the teacher of a distillation takes of a rank's memory: held all through a run, and asked before each step.

Sharded as the student is, its layers are gathered while it is asked and freed before the student is trained; the head,
with what else is outside the layers but an embedding of its own, stays gathered for the loss.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fourfold.planning.job import Job, Teacher
from fourfold.planning.layout import Layout
from fourfold.planning.states import held_part, layer_part, outer_part, stage_of


@dataclass(frozen=True, slots=True)
class TeacherMemory:
    """Bytes of a rank.

    Attributes:
        held: weights with the constants of packed ones, all through the run.
        head: what is gathered beside them while the student is trained.
        asked: the same while the teacher is asked.
        activations: of a micro-batch then.
        states: the last hidden states of a micro-batch's trained positions, beside the student's loss.
    """

    held: int
    head: int
    asked: int
    activations: int
    states: int


def teacher_memory(teacher: Teacher, job: Job, layout: Layout, pp_rank: int, positions: int) -> TeacherMemory:
    """What a rank of the pipeline takes.

    Args:
        positions: of a micro-batch on this rank.
    """
    shape = teacher.shape
    layout = replace(layout, pp_layers=())
    if layout.ep > 1 and not shape.experts:
        layout = replace(layout, ep=1, cp_shards=True)
    frozen = replace(
        job, tuning="lora", lora_targets=(), bits=teacher.bits, double_quant=teacher.double_quant, teacher=None
    )
    part = held_part(shape, frozen, layout, pp_rank)
    stage, seen = stage_of(shape, frozen, layout, pp_rank), layout.of_a_layer()
    outer = outer_part(shape, frozen, seen, is_first=stage.is_first, is_last=stage.is_last)
    head = outer.whole
    if not shape.tied and stage.is_first:
        rest = replace(shape, outer=tuple(weight for weight in shape.outer if weight.kind != "embedding"))
        head = outer_part(rest, frozen, seen, is_first=True, is_last=stage.is_last).whole
    if not stage.is_last:
        head = 0
    largest = max(layer_part(shape, frozen, seen, kind, trained=False).whole for kind in range(len(shape.kinds)))
    stays = layout.pp > 1 or not layout.reshards
    width = 4 * shape.hidden + 3 * max(shape.intermediate, shape.expert_intermediate * shape.experts_per_token)
    return TeacherMemory(
        held=0 if layout.offload == "params" else part.weights + part.scales,
        head=head,
        asked=part.whole if stays else outer.whole + 2 * largest,
        activations=job.compute_bytes * positions * width // layout.tp,
        states=int(job.compute_bytes * positions * job.trained_share * shape.hidden) if stage.is_last else 0,
    )
