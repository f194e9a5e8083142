"""One rank of a job, rehearsed and predicted: what the grids of memory, of time and of verdicts share.

Each point runs one rank through `fourfold rehearse`'s own function, its partners imagined: on a GPU for real, or with
`--fake` on tensors without numbers, whose peak is counted operator by operator. Results are appended to a file of JSON
lines; points that are there already are left out, so that a run may be cut short and gone on with. With `--again`
nothing is run: what is predicted of the points that are there is predicted anew, on any machine.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import tempfile
import time
import traceback
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from fourfold.config.load import load
from fourfold.config.schema import Run
from fourfold.planning.cost import estimate_cost
from fourfold.planning.device import Device
from fourfold.planning.engines import compiled_engine
from fourfold.planning.estimate import Memory
from fourfold.planning.hardware import build_cluster, find_device
from fourfold.planning.job import Job, Recompute
from fourfold.planning.layout import Layout
from fourfold.planning.memory import estimate_memory
from fourfold.planning.read_shape import read_shape
from fourfold.planning.shape import ModelShape
from fourfold.training.host_speed import host_op_seconds
from fourfold.training.rehearse import Workload, rehearse

MODELS = Path(__file__).resolve().parent.parent / "examples" / "models"
GIB = 2**30

TUNINGS: dict[str, dict[str, Any]] = {
    "full": {"finetuning_type": "full", "bf16": True},
    "pure": {"finetuning_type": "full", "pure_bf16": True},
    "lora": {"finetuning_type": "lora", "bf16": True},
    "qlora": {"finetuning_type": "lora", "bf16": True, "quantization_bit": 4},
    "full compiled": {"finetuning_type": "full", "bf16": True, "torch_compile": True},
    "full float8": {"finetuning_type": "full", "bf16": True, "torch_compile": True, "fp8": True},
    "lora compiled": {"finetuning_type": "lora", "bf16": True, "torch_compile": True},
    "qlora compiled": {"finetuning_type": "lora", "bf16": True, "quantization_bit": 4, "torch_compile": True},
}


@dataclass(frozen=True)
class Point:
    """One run of one rank.

    Attributes:
        model: folder of examples/models; layers: cut to so many, 0 for all.
        sequences: lengths of a micro-batch's documents.
        stage: rank of the pipeline.
        spared: layers of which nothing is computed again where others are.
        unpacked: 4-bit weights are unpacked once and kept.
    """

    model: str
    tuning: str
    layout: Layout
    recompute: Recompute = "none"
    sequences: tuple[int, ...] = (4096,)
    batches: int = 1
    stage: int = 0
    layers: int = 0
    spared: int = 0
    unpacked: bool = False

    @property
    def name(self) -> str:
        """What the results call it."""
        length = f"{len(self.sequences)}x{self.sequences[0]}"
        where = f" stage {self.stage}" if self.layout.pp > 1 else ""
        size = f"{self.model}/{self.layers} layers" if self.layers else self.model
        return f"{size} {self.tuning} {self.layout.describe()}{where} {self.recompute} {length} x{self.batches}"


def point_of(fields: dict[str, Any]) -> Point:
    """A point from its row."""
    layout = Layout(**{**fields["layout"], "pp_layers": tuple(fields["layout"]["pp_layers"])})
    return Point(**{**fields, "layout": layout, "sequences": tuple(fields["sequences"])})


@lru_cache(maxsize=1)
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


def folder_of(point: Point) -> Path:
    """The model's folder, with fewer layers if the point says so."""
    source = MODELS / point.model
    if not point.layers:
        return source
    folder = Path(_scratch().name) / f"{point.model}-{point.layers}"
    folder.mkdir(exist_ok=True)
    entries = json.loads((source / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**entries, "num_hidden_layers": point.layers}), encoding="utf-8")
    return folder


@lru_cache(maxsize=32)
def _shape(folder: Path) -> ModelShape:
    return read_shape(AutoConfig.from_pretrained(folder))


def described(point: Point) -> tuple[Run, ModelShape, Job]:
    """What the engine and the planner are told of a point."""
    folder = folder_of(point)
    keys = {"model_name_or_path": str(folder), "cutoff_len": max(point.sequences)}
    run, shape = load({**keys, **TUNINGS[point.tuning]}), _shape(folder)
    job = Job.of(run)
    job = replace(
        job,
        sequence=point.sequences[0],
        micro_batch=sum(point.sequences),
        sequences_per_step=len(point.sequences) * point.batches * point.layout.dp,
        engine=compiled_engine(shape, point.layout, job.compute) if run.training.torch_compile else "eager",
    )
    return run, shape, job


def predicted_memory(point: Point, card: Device | None) -> Memory:
    """What the planner says that the rank takes."""
    _, shape, job = described(point)
    return estimate_memory(
        shape, job, point.layout, point.recompute, sum(point.sequences), rank=point.stage, device=card
    )


def joins_gradients(point: Point) -> bool:
    """What a run on an 80 GB card decides about FSDP's shards of gradients; the size of the card does not matter."""
    return predicted_memory(point, find_device("h100")).joins_gradients


def measure(point: Point, device: torch.device | None, steps: int = 4) -> dict[str, Any]:
    """One point: what was measured, and what is predicted."""
    run, _, _ = described(point)
    started = time.perf_counter()
    found = rehearse(
        run,
        point.layout,
        Workload(point.sequences, point.batches),
        rank=point.stage * (point.layout.world_size // point.layout.pp),
        recompute=point.recompute,
        device=device,
        steps=2 if device is None else steps,
        joins_gradients=joins_gradients(point),
    )
    row: dict[str, Any] = {
        "measured_gib": found.peak.total / GIB,
        "phase": found.peak.phase,
        "step_s": found.step_s,
        "tokens": found.tokens,
        "took_s": time.perf_counter() - started,
    }
    if device is not None and found.reserved is not None:
        free, total = torch.cuda.mem_get_info(device)
        row["reserved_gib"] = found.reserved / GIB
        row["used_gib"] = (total - free) / GIB
        row["streams_gib"] = _reserved_by_stream()
    return row


def predictions(point: Point, gpu: str | None, host_op_us: float | None) -> dict[str, Any]:
    """What the planner says of a point.

    Args:
        gpu: name of the card; None for none.
        host_op_us: what its host was found to take for an operator.
    """
    card = None if gpu is None else find_device(gpu)
    memory = predicted_memory(point, card)
    row: dict[str, Any] = {
        "predicted_gib": memory.allocated / GIB,
        "terms_gib": {name: size / GIB for name, size in memory.terms.items()},
    }
    if card is not None:
        row["predicted_reserved_gib"] = memory.reserved / GIB
        row["predicted_device_gib"] = memory.device / GIB
        if point.layout.world_size == 1 and host_op_us is not None:
            _, shape, job = described(point)
            cluster = build_cluster(replace(card, host_op_s=host_op_us * 1e-6))
            cost = estimate_cost(shape, job, point.layout, cluster, point.recompute, job.micro_batch)
            row["predicted_step_s"] = cost.step_s
    return row


def _reserved_by_stream() -> list[float]:
    """What the allocator has reserved for each stream, most first: a stream cannot use another one's memory."""
    found: dict[int, int] = {}
    for segment in torch.cuda.memory_snapshot():
        found[segment["stream"]] = found.get(segment["stream"], 0) + segment["total_size"]
    return sorted((size / GIB for size in found.values()), reverse=True)


def arguments(doc: str | None, default_out: str) -> argparse.ArgumentParser:
    """The options that all grids have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fake", action="store_true", help="tensors without numbers, on a CPU")
    parser.add_argument("--again", action="store_true", help="run nothing, only predict anew what is in the file")
    parser.add_argument("--only", default="", help="points whose name has this in it")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which no point is begun")
    parser.add_argument("--out", type=Path, default=Path(f"runs/benchmarks/{default_out}.jsonl"))
    return parser


def run_points(points: Iterable[Point], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run what is missing in the file of results, and return all of it."""
    if args.again:
        return predict_again(args.out)
    device = None if args.fake else torch.device("cuda", 0)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    known = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    done = {row["point"] for row in known}
    deadline = time.monotonic() + args.budget
    with args.out.open("a", encoding="utf-8") as out:
        for point in points:
            if point.name in done or args.only not in point.name or time.monotonic() > deadline:
                continue
            row = {"point": point.name, "fields": asdict(point), **_attempt(point, device)}
            _show(row)
            known.append(row)
            out.write(json.dumps(row) + "\n")
            out.flush()
            gc.collect()
            if device is not None:
                torch.cuda.empty_cache()
    return known


def predict_again(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, what is predicted of them made anew and written back."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        if "error" not in row:
            row |= predictions(point_of(row["fields"]), row["gpu"], row["host_op_us"])
        _show(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return rows


def _attempt(point: Point, device: torch.device | None) -> dict[str, Any]:
    gpu = None if device is None else torch.cuda.get_device_name(device)
    host_op_us = None if device is None else 1e6 * host_op_seconds(device)
    machine = {"gpu": gpu, "host_op_us": host_op_us}
    try:
        found = measure(point, device)
    except torch.OutOfMemoryError as error:
        found = {"out_of_memory": str(error)[:600]}
    except Exception:
        return {**machine, "error": traceback.format_exc()[-1500:]}
    return {**machine, **found, **predictions(point, gpu, host_op_us)}


def _show(row: dict[str, Any]) -> None:
    if "error" in row:
        print(f"failed  {row['point']}: {row['error'].splitlines()[-1]}", flush=True)
    elif "out_of_memory" in row:
        print(f"out of memory, {row['predicted_device_gib']:.2f} GiB predicted  {row['point']}", flush=True)
    else:
        error = 100 * (row["predicted_gib"] / row["measured_gib"] - 1)
        speed = ""
        if row.get("predicted_step_s"):
            speed = f"  step {row['step_s']:.4f} s {100 * (row['predicted_step_s'] / row['step_s'] - 1):+5.1f} %"
        print(f"{error:+6.1f} %  {row['measured_gib']:7.2f} GiB{speed}  {row['point']}", flush=True)
