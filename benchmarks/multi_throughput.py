"""Speed and memory of a rank's share of a job, random weights made on the device, every collective for real.

A step is timed from where the device ends the one before to where it ends this one, and read once the next is begun,
as a run does. What a pipeline idles comes from a pass of twice as many micro-batches: a micro-batch takes what the two
passes differ by, over the number by which they do; what is left of the shorter one is idle (the optimizer is not in
it). Fewer would not do: below twice as many as it has stages zero bubble idles less. gpipe, which keeps the
activations of all of them, is timed with half as many instead.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from fourfold.dataset.batch import Batch
from fourfold.parallel.mesh import Mesh
from fourfold.parallel.step import StepResult
from fourfold.parallel.whole import everyone
from fourfold.planning.keeps import Keeps
from fourfold.training.host_speed import host_op_seconds
from gpu_clock import gpu_events, mark, profiled, seconds_between
from multi_assembly import Ready, assemble, free, made_up, peak_gib, random_model
from multi_layouts import TINY_WIDTHS
from multi_speeds import Speed
from rehearsed import MODELS, Point, described, joins_gradients

WARM, TIMED = 2, 4
_TINY_LAYERS = 8
"""As many as four ranks of a pipeline have stages."""
_TINY_TOKENS = 48


def point_of(case: Speed, work: Path, rank: int, *, is_tiny: bool) -> Point:
    """What the planner and the rehearsal call a point; for a CPU with a model that it can train in a second.

    Args:
        work: where rank 0 writes the tiny model's config while the others wait; every rank must call.
    """
    fields = {field.name: getattr(case, field.name) for field in dataclasses.fields(Point) if field.name != "stage"}
    point = Point(**fields)
    if not is_tiny:
        return point
    folder = work / f"{case.model}-tiny"
    if rank == 0 and not folder.exists():
        entries = json.loads((MODELS / case.model / "config.json").read_text(encoding="utf-8"))
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(entries | _tiny_entries(entries)), encoding="utf-8")
    everyone(None)
    layout = replace(point.layout, pp_layers=())
    return replace(point, model=str(folder), layers=0, layout=layout, sequences=(_TINY_TOKENS,) * len(point.sequences))


def _tiny_entries(entries: dict[str, Any]) -> dict[str, Any]:
    found = {**TINY_WIDTHS, "num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": _TINY_LAYERS}
    if "num_experts" in entries:
        found |= {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    return {**found, "tie_word_embeddings": False}


def run_case(case: Speed, point: Point, mesh: Mesh, trace: Path | None = None) -> dict[str, Any]:
    """Train a case; every rank of the mesh must call.

    Args:
        point: as `point_of` gives it.
        trace: file for a trace of one more step on rank 0, None for none.
    Returns:
        this rank's figures; memory in GiB, `held_before_gib` what earlier cases have left.
    """
    run, shape, _ = described(point)
    free(mesh.device)
    held_before_gib = peak_gib(mesh.device)[0]
    started = time.perf_counter()
    keeps = Keeps(spared=point.spared, unpacked=point.unpacked)
    ready = assemble(run, mesh, random_model(run, mesh), sum(point.sequences), point.recompute, keeps)
    if joins_gradients(point):
        ready.built.join_gradients()
    loaded_s, (loaded_gib, _) = time.perf_counter() - started, peak_gib(mesh.device)
    batches = _batches(ready, point, shape.vocab, mesh)
    for _ in range(WARM):
        ready.train(batches)
    _wait(mesh.device)
    if mesh.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds, results = _timed(ready, batches, mesh.device)
    tokens, losses = results[-1].num_tokens, [result.loss for result in results]
    allocated, reserved = peak_gib(mesh.device)
    found = {
        "step_s": median(seconds),
        "step_seconds": seconds,
        "tokens_per_step": tokens,
        "tokens_per_sec_per_gpu": tokens / median(seconds) / mesh.layout.world_size,
        "losses": losses,
        "losses_finite": all(map(math.isfinite, losses)),
        "held_before_gib": held_before_gib,
        "loaded_s": loaded_s,
        "loaded_gib": loaded_gib,
        "allocated_gib": allocated,
        "reserved_gib": reserved,
        "packed": ready.policy.packed,
    }
    if case.bubble:
        found |= idle_of(ready, batches, mesh.device)
    if trace is not None:
        found |= _traced(ready, batches, mesh, trace)
    if mesh.device.type == "cuda":
        found["host_op_us"] = 1e6 * host_op_seconds(mesh.device)
    return found


def _timed(ready: Ready, batches: Sequence[Batch], device: torch.device) -> tuple[list[float], list[StepResult]]:
    """Seconds of each step, and what it found."""
    results: list[StepResult] = []
    on_gpu = device.type == "cuda"
    ends = [mark(on_gpu=on_gpu)]
    unread: Callable[[], tuple[StepResult, float]] | None = None
    for _ in range(TIMED):
        begun = ready.begin(batches)
        ends.append(mark(on_gpu=on_gpu))
        if unread is not None:
            results.append(unread()[0])
        unread = begun
    assert unread is not None
    results.append(unread()[0])
    _wait(device)
    return [seconds_between(*pair) for pair in pairwise(ends)], results


def merge_ranks(found: Sequence[dict[str, Any] | None]) -> dict[str, Any]:
    """One row of what the ranks found: times of the slowest, memory of each; None for ranks that had no part."""
    rows = [row for row in found if row is not None]
    slowest = max(rows, key=lambda row: row["step_s"])
    busy = [row.pop("busy_s") for row in rows if "busy_s" in row]
    idle = {"busy_s": busy, "bubble_of_kernels": 1 - fmean(busy) / slowest["traced_pass_s"]} if busy else {}
    return {
        **rows[0],  # which alone has what was traced
        **slowest,
        **idle,
        "ranks": len(rows),
        "losses": rows[0]["losses"],
        **{key: [row[key] for row in rows] for key in ("loaded_gib", "allocated_gib", "reserved_gib")},
    }


def idle_of(ready: Ready, batches: Sequence[Batch], device: torch.device) -> dict[str, float]:
    """What a pipeline idles in forward and backward of a step: by passes of two lengths; and by this rank's kernels
    but those that wait for another rank, in which the host's pace and unequal stages count as idling, too."""

    def seconds_of(count: int) -> float:
        ready.optimizer.zero_grad(set_to_none=True)
        _wait(device)
        began = time.perf_counter()
        ready.step.forward_backward([*batches, *batches][:count])
        _wait(device)
        return time.perf_counter() - began

    layout, own = ready.built.mesh.layout, len(batches)
    other = own // 2 if layout.pp_schedule == "gpipe" else 2 * own
    own_s, other_s = (median([seconds_of(count) for _ in range(TIMED)][1:]) for count in (own, other))
    each, share = bubble_of(own_s, other_s, own, other)
    found = {"micro_batches": own, "micro_batch_s": each, "pass_s": own_s, "bubble": share}
    if device.type != "cuda":
        return found
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        traced_s = seconds_of(own)
    _, work = _kernels(profiler)
    return {**found, "traced_pass_s": traced_s, "busy_s": 1e-3 * _merged(work)}


def bubble_of(pass_s: float, other_s: float, count: int, other: int) -> tuple[float, float]:
    """Seconds of a micro-batch, and the share of a pass that is not micro-batches.

    Args:
        pass_s, other_s: passes of `count` and of `other` micro-batches.
    """
    each = (other_s - pass_s) / (other - count)
    return each, 1 - count * each / pass_s


def _batches(ready: Ready, point: Point, vocabulary: int, mesh: Mesh) -> list[Batch]:
    """The micro-batches of a step of this data-parallel rank, each of the point's sequences."""
    source = random.Random(mesh.dp_rank)
    return [
        batch
        for number in range(point.batches)
        for batch in ready.cut([made_up(source, length, vocabulary, number) for length in point.sequences])
    ]


def _traced(ready: Ready, batches: Sequence[Batch], mesh: Mesh, trace: Path) -> dict[str, float]:
    """One more step, traced on rank 0: milliseconds with any kernel, with the exchange, with the exchange alone."""
    if mesh.rank:
        ready.train(batches)
        _wait(mesh.device)
        return {}
    with profile(activities=profiled(on_gpu=mesh.device.type == "cuda")) as profiler:
        ready.train(batches)
        _wait(mesh.device)
    profiler.export_chrome_trace(str(trace))
    exchange, work = _kernels(profiler)
    either = _merged([*exchange, *work])
    return {"busy_ms": either, "exchange_ms": _merged(exchange), "exchange_alone_ms": either - _merged(work)}


def _kernels(profiler: profile) -> tuple[list[Any], list[Any]]:
    """When kernels ran that exchange something with other ranks, and when all others did."""
    kernels = gpu_events(profiler)
    exchange = [event.time_range for event in kernels if "nccl" in event.name.lower()]
    return exchange, [event.time_range for event in kernels if "nccl" not in event.name.lower()]


def _merged(ranges: Sequence[Any]) -> float:
    """Milliseconds that the ranges cover together."""
    covered, until = 0.0, 0.0
    for found in sorted(ranges, key=lambda found: found.start):
        covered += max(found.end - max(found.start, until), 0.0)
        until = max(until, found.end)
    return covered / 1e3


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
