"""What would fit where nothing does: one change at a time, smallest first, each with its predicted peak."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from fourfold.base.errors import PlanError
from fourfold.base.units import GIB
from fourfold.config.parallel import ParallelConfig
from fourfold.planning.candidates import candidates, name_of
from fourfold.planning.fit import least_state_bytes
from fourfold.planning.hardware import Cluster
from fourfold.planning.held import held_by
from fourfold.planning.job import Job
from fourfold.planning.layout import Layout
from fourfold.planning.predictor import Form, Predictor
from fourfold.planning.shape import ModelShape
from fourfold.planning.wishes import Wishes

_SHORTEST = 128
_MOST_GPUS = 1024
_MOST_TRIED = 60
_USUAL_NODE = 8


@dataclass(frozen=True, slots=True)
class Rescue:
    """A change after which something fits.

    Attributes:
        change: for people, e.g. `cutoff_len: 4096 instead of 16384`.
        config: the keys to set; empty where it is not the config that changes.
        form: what fits then, in its leanest form.
        device_bytes: predicted peak of its most loaded GPU.
    """

    change: str
    config: dict[str, Any] = field(hash=False)
    form: Form
    device_bytes: int

    def as_json(self) -> dict[str, Any]:
        """One entry of `changes`."""
        fits = {"layout": name_of(self.form.layout), "recompute": self.form.recompute}
        return {"change": self.change, "config": self.config, **fits, "device_gib": self.device_bytes / GIB}


@dataclass(frozen=True, slots=True)
class _Trial:
    change: str
    config: dict[str, Any]
    job: Job
    cluster: Cluster
    wishes: Wishes


def find_rescues(shape: ModelShape, job: Job, cluster: Cluster, wishes: Wishes, margin: float) -> tuple[Rescue, ...]:
    """The changes that make the job fit; where several degrees of one would, the least.

    Micro-batches of one sequence are no change: the search has tried them.

    Args:
        margin: share of a device's memory to be left free.
    """
    kinds = (_keys, _shorter, _leaner, _offloaded, _more_gpus)
    start = _Trial("", {}, job, cluster, wishes)
    found: list[Rescue] = []
    for kind in kinds:
        for degrees in kind(start):
            tried = (_try(shape, trial, margin) for trial in degrees)
            found += itertools.islice((rescue for rescue in tried if rescue is not None), 1)
    return tuple(found)


def _try(shape: ModelShape, trial: _Trial, margin: float) -> Rescue | None:
    """The simplest layout that fits after a change; None if none does."""
    limit = int(trial.cluster.device.memory_bytes * (1 - margin))
    predictor = Predictor(shape, trial.job, trial.cluster, trial.wishes)
    try:
        layouts, _ = candidates(shape, trial.job, trial.cluster, trial.wishes)
    except PlanError:
        return None
    hopeful = (layout for layout in layouts if least_state_bytes(shape, trial.job, layout) <= limit)
    for layout in itertools.islice(hopeful, _MOST_TRIED):
        form = predictor.leanest(layout)
        need = predictor.memory(form).device
        if need <= limit:
            return Rescue(trial.change + _on_host(shape, trial, form.layout), trial.config, form, need)
    return None


def _on_host(shape: ModelShape, trial: _Trial, layout: Layout) -> str:
    """What a node's memory must take of what is offloaded."""
    if layout.offload == "none":
        return ""
    held = held_by(shape, trial.wishes.job_of(trial.job, layout), layout)
    each = held.optimizer if layout.offload == "optimizer" else held.total
    return f", {each * trial.cluster.per_node / GIB:,.0f} GiB a node"


def _keys(start: _Trial) -> Iterator[list[_Trial]]:
    """Keys of the layout that the config gives: recompute, then strategy and sizes."""
    wishes = start.wishes
    if "full" not in wishes.recomputes:
        free = replace(wishes, recomputes=("full",))
        text = f"parallel.recompute: full instead of {wishes.recomputes[-1]}"
        yield [replace(start, change=text, config={"parallel": {"recompute": "full"}}, wishes=free)]
    given = wishes.parallel.model_fields_set & {"strategy", "dp_replicate", "dp_shard", "cp", "tp", "pp", "ep"}
    if given and start.cluster.world_size > 1:
        free = replace(wishes, parallel=ParallelConfig())
        text = f"strategy: auto, without {', '.join(sorted(given))}"
        yield [replace(start, change=text, config={"strategy": "auto"}, wishes=free)]


def _shorter(start: _Trial) -> Iterator[list[_Trial]]:
    job, degrees = start.job, list[_Trial]()
    length = job.sequence // 2
    while length >= _SHORTEST:
        shorter = replace(job, sequence=length, micro_batch=min(job.micro_batch, length))
        text = f"cutoff_len: {length} instead of {job.sequence}"
        degrees.append(replace(start, change=text, config={"cutoff_len": length}, job=shorter))
        length //= 2
    yield degrees


def _leaner(start: _Trial) -> Iterator[list[_Trial]]:
    """Fewer bytes for each parameter: masters in bf16, adapters, 4 bits, an optimizer of 8 bits."""
    job = start.job
    if job.tuning == "full" and job.master == "fp32" and job.compute == "bf16":
        text = "pure_bf16: true (weights, gradients and moments in bf16)"
        yield [replace(start, change=text, config={"pure_bf16": True}, job=replace(job, master="bf16"))]
    if job.tuning == "full" and job.optim == "adamw_torch":
        text = "optim: adamw_8bit (one process, or replicas)"
        yield [replace(start, change=text, config={"optim": "adamw_8bit"}, job=replace(job, optim="adamw_8bit"))]
    degrees = []
    if job.tuning != "lora":
        adapters = replace(job, tuning="lora")
        text = f"finetuning_type: lora instead of {job.tuning}"
        degrees.append(replace(start, change=text, config={"finetuning_type": "lora"}, job=adapters))
    if job.bits != 4:
        packed = replace(job, tuning="lora", bits=4)
        config = {"finetuning_type": "lora", "quantization_bit": 4}
        text = "finetuning_type: lora with quantization_bit: 4 (QLoRA)"
        degrees.append(replace(start, change=text, config=config, job=packed))
    yield degrees


def _offloaded(start: _Trial) -> Iterator[list[_Trial]]:
    job, parallel = start.job, start.wishes.parallel
    if job.compute == "fp16" or job.optim != "adamw_torch" or parallel.offload != "none":
        return
    degrees = []
    words = {"optimizer": "AdamW's state in host memory", "params": "weights, gradients and state in host memory"}
    for kind, meaning in words.items():
        moved = replace(start.wishes, parallel=parallel.model_copy(update={"offload": kind}))
        text = f"parallel.offload: {kind} ({meaning})"
        degrees.append(replace(start, change=text, config={"parallel": {"offload": kind}}, wishes=moved))
    yield degrees


def _more_gpus(start: _Trial) -> Iterator[list[_Trial]]:
    """Twice as many, and again: first in the node, then nodes."""
    cluster, degrees = start.cluster, list[_Trial]()
    gpus, nodes = cluster.per_node, cluster.nodes
    while 2 * gpus * nodes <= _MOST_GPUS:
        if nodes == 1 and 2 * gpus <= min(_USUAL_NODE, cluster.device.link_domain):
            gpus *= 2
        else:
            nodes *= 2
        # a node with more of the same cards has more of the same network
        link = replace(cluster.node_link, bytes_per_s=cluster.node_link.bytes_per_s * gpus / cluster.per_node)
        larger = replace(cluster, per_node=gpus, nodes=nodes, node_link=link)
        more = larger.world_size - cluster.world_size
        where = f"in {nodes} nodes" if nodes > 1 else "in one node"
        text = f"{more} more GPU{'s' if more > 1 else ''}: {larger.world_size} {where}"
        degrees.append(replace(start, change=text, config={}, cluster=larger))
    yield degrees
