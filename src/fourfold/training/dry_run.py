"""The verb `rehearse`: ranks of a planned job, run one after the other on this machine, beside what was predicted."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fourfold.base.errors import PlanError
from fourfold.base.log import told_elsewhere
from fourfold.base.units import GIB
from fourfold.config.schema import Run
from fourfold.planning.cost import estimate_cost
from fourfold.planning.estimate import Estimate, Memory
from fourfold.planning.layout import Layout
from fourfold.planning.memory import estimate_memory
from fourfold.planning.search import Plan
from fourfold.planning.stages import min_microbatches
from fourfold.planning.states import held_part, optimizer_bytes
from fourfold.training.host_speed import with_this_host
from fourfold.training.rehearse import Rehearsal, Workload, left_out, rehearse

_MOST_BATCHES = 2
"""Micro-batches of a rehearsed step: memory does not change after the second, but in a pipeline."""
_WORST_LOAD = 2.0
"""Tokens at this rank's experts, over those of an even spread, in the second rehearsal of expert parallelism."""


@dataclass(frozen=True, slots=True)
class Rehearsed:
    """One rank: what was predicted and what was measured.

    Attributes:
        rank: of the job.
        held: bytes predicted between steps: parameters, gradients, optimizer.
        memory: predicted at the peak.
        found: measured.
        worst: measured with the experts of this rank chosen `_WORST_LOAD` times as often; None without them.
        share: of the step's micro-batches that were run.
        compute_s: predicted of computing in a step, with this machine's host.
    """

    rank: int
    held: dict[str, int]
    memory: Memory
    found: Rehearsal
    worst: Rehearsal | None
    share: float
    compute_s: float

    def as_json(self) -> dict[str, Any]:
        """One entry of `ranks` of `fourfold rehearse --json`."""
        found = self.found
        measured = {"parameters": found.parameters, "gradients": found.gradients, "optimizer": found.optimizer}
        return {
            "rank": self.rank,
            "predicted_gib": {name: size / GIB for name, size in self.held.items()},
            "measured_gib": {name: size / GIB for name, size in measured.items()},
            "predicted_terms_gib": {name: size / GIB for name, size in self.memory.terms.items()},
            "predicted_allocated_gib": self.memory.allocated / GIB,
            "measured_allocated_gib": found.peak.total / GIB,
            "predicted_reserved_gib": self.memory.reserved / GIB,
            "measured_reserved_gib": None if found.reserved is None else found.reserved / GIB,
            "worst_load_allocated_gib": None if self.worst is None else self.worst.peak.total / GIB,
            "step_s": found.step_s,
            "predicted_compute_s": self.compute_s,
            "share_of_step": self.share,
            "tokens": found.tokens,
        }


def rehearse_plan(run: Run, plan: Plan, ranks: Sequence[str], *, fake: bool, steps: int) -> list[Rehearsed]:
    """Run some ranks of a plan's best layout.

    Args:
        ranks: numbers, `first`, `last`; empty for the most loaded one.
        fake: tensors without numbers; no device is needed.
        steps: of each rehearsal.
    Raises:
        PlanError: nothing fits, no such rank, or no GPU for a real rehearsal.
    """
    best = plan.best
    if best is None:
        raise PlanError("rehearse: nothing fits this hardware. `fourfold plan` tells what would.")
    if not fake and not torch.cuda.is_available():
        raise PlanError("rehearse: there is no GPU here. Use --fake, which needs none.")
    device = None if fake else torch.device("cuda", 0)
    numbers = _numbers(ranks, best)
    with told_elsewhere(True):  # how the model is prepared is told by a run
        return [_rehearse_rank(run, plan, best, rank, device, steps) for rank in numbers]


def _numbers(ranks: Sequence[str], best: Estimate) -> list[int]:
    layout = best.layout
    stride = layout.world_size // layout.pp  # the pipeline is the outermost axis
    if not ranks:
        return [best.memory.rank * stride]
    words = {"first": 0, "last": layout.world_size - 1}
    numbers = []
    for word in ranks:
        if word not in words and not word.isdigit():
            raise PlanError(f"ranks: {word!r} is no rank. Use first, last, or a number below {layout.world_size}.")
        number = words[word] if word in words else int(word)
        if number >= layout.world_size:
            raise PlanError(f"ranks: {number} is out of range. The job has the ranks 0 to {layout.world_size - 1}.")
        numbers.append(number)
    return numbers


def _rehearse_rank(
    run: Run, plan: Plan, best: Estimate, rank: int, device: torch.device | None, steps: int
) -> Rehearsed:
    layout = best.layout
    job = best.keeps.job(replace(plan.wishes.job_of(plan.job, layout), engine=best.engine))
    in_batch = max(best.micro_batch // job.sequence, 1)
    of_step = max(-(-job.sequences_per_step // (layout.dp * in_batch)), _fewest(layout))
    batches = min(of_step, max(_MOST_BATCHES, _fewest(layout)))
    stage = rank // (layout.world_size // layout.pp)
    workload = Workload((min(job.sequence, best.micro_batch),) * in_batch, batches, job.trained_share)
    card = None if device is None else plan.cluster.device
    memory = estimate_memory(plan.shape, job, layout, best.recompute, best.micro_batch, rank=stage, device=card)
    settings = {
        "rank": rank,
        "recompute": best.recompute,
        "device": device,
        "unpacked": best.keeps.unpacked,
        "spared": best.keeps.spared,
        "joins_gradients": memory.joins_gradients,
    }
    found = rehearse(run, layout, workload, **settings, steps=steps)
    worst = None
    if layout.ep > 1:
        loaded = Workload(workload.sequences, batches, job.trained_share, _WORST_LOAD)
        worst = rehearse(run, layout, loaded, **settings)
    part = held_part(plan.shape, job, layout, stage)
    held = {
        "parameters": part.weights,
        "gradients": part.trained * job.master_bytes,
        "optimizer": optimizer_bytes(job, part.trained),
    }
    compute_s = best.cost.compute_s
    if device is not None:
        cluster = with_this_host(plan.cluster, device)
        compute_s = estimate_cost(plan.shape, job, layout, cluster, best.recompute, best.micro_batch).compute_s
    return Rehearsed(rank, held, memory, found, worst, batches / of_step, compute_s)


def _fewest(layout: Layout) -> int:
    return min_microbatches(layout) if layout.pp > 1 else 1


def as_text(run: Run, plan: Plan, found: Sequence[Rehearsed], *, fake: bool) -> str:
    """What was found, for a terminal of 80 columns."""
    best = plan.best
    assert best is not None
    how = f"recompute {best.recompute}, micro-batches of {best.micro_batch:,} tokens"
    lines = [
        *_wrapped(f"REHEARSAL of {best.layout.describe()}, {how}"),
        "Fake tensors: what an allocator would count, operator by operator."
        if fake
        else f"On this machine's GPU; the plan is for {plan.cluster.describe()}.",
        *(line for note in left_out(run) for line in _wrapped(note)),
    ]
    for one in found:
        lines += ["", f"Rank {one.rank} of {best.layout.world_size}{'':24}predicted   measured  difference"]
        measured = one.found
        pairs: list[tuple[str, int, int | None]] = [
            ("parameters", one.held["parameters"], measured.parameters),
            ("gradients", one.held["gradients"], measured.gradients),
            ("optimizer state", one.held["optimizer"], measured.optimizer),
            ("peak, allocated", one.memory.allocated, measured.peak.total),
        ]
        if measured.reserved is not None:
            pairs.append(("peak, reserved", one.memory.reserved, measured.reserved))
        lines += [_line(name, predicted, size) for name, predicted, size in pairs if size is not None]
        at_peak = ("gradients", "gathered", "activations", "logits", "buffers")
        terms = ", ".join(
            f"{name} {one.memory.terms[name] / GIB:.2f}" for name in at_peak if one.memory.terms.get(name)
        )
        lines += _wrapped(f"  predicted at the peak beside parameters and state: {terms} GiB")
        if one.worst is not None:
            peak = f"{one.worst.peak.total / GIB:.2f} GiB"
            lines.append(f"  peak with {_WORST_LOAD:g} times the tokens at this rank's experts: {peak}")
        if measured.step_s is not None:
            whole = measured.step_s / one.share
            lines.append(
                f"  computing: {whole:.3f} s a step measured, {one.compute_s:.3f} s predicted (nothing is sent)"
            )
    return "\n".join(lines)


def _line(name: str, predicted: int, measured: int) -> str:
    difference = f"{100 * (predicted / measured - 1):+9.1f} %" if measured else ""
    return f"  {name:32}{predicted / GIB:11.3f}{measured / GIB:11.3f}{difference} (GiB)"


def _wrapped(text: str, width: int = 80) -> list[str]:
    return textwrap.wrap(text, width, subsequent_indent="    ")
