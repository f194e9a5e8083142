"""Predicted against measured memory, over models, tunings, layouts, recompute and lengths.

    python benchmarks/memory_grid.py [--fake] [--only TEXT] [--budget SECONDS] [--out FILE]

Each point runs one rank of a job through `fourfold rehearse`'s own function, its partners imagined: on a GPU for real,
or with `--fake` on tensors without numbers, whose peak is counted operator by operator. Results are appended to a file
of JSON lines; points that are there already are left out, so that a run may be cut short and gone on with. At the end:
signed errors of `planning/memory.py`, their median and 95th percentile, and the worst.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from environment import environment
from fourfold.config.load import load
from fourfold.planning.hardware import find_device
from fourfold.planning.job import Job, Recompute
from fourfold.planning.layout import Layout
from fourfold.planning.memory import estimate_memory
from fourfold.planning.read_shape import read_shape
from fourfold.training.rehearse import Workload, rehearse

MODELS = Path(__file__).resolve().parent.parent / "examples" / "models"
GIB = 2**30

TUNINGS: dict[str, dict[str, Any]] = {
    "full": {"finetuning_type": "full", "bf16": True},
    "pure": {"finetuning_type": "full", "pure_bf16": True},
    "lora": {"finetuning_type": "lora", "bf16": True},
    "qlora": {"finetuning_type": "lora", "bf16": True, "quantization_bit": 4},
}


@dataclass(frozen=True)
class Point:
    """One run of one rank.

    Attributes:
        model: folder of examples/models; layers: cut to so many, 0 for all.
        sequences: lengths of a micro-batch's documents.
        stage: rank of the pipeline.
    """

    model: str
    tuning: str
    layout: Layout
    recompute: Recompute = "none"
    sequences: tuple[int, ...] = (4096,)
    batches: int = 1
    stage: int = 0
    layers: int = 0

    @property
    def name(self) -> str:
        """What the results call it."""
        length = f"{len(self.sequences)}x{self.sequences[0]}"
        where = f" stage {self.stage}" if self.layout.pp > 1 else ""
        size = f"{self.model}/{self.layers} layers" if self.layers else self.model
        return f"{size} {self.tuning} {self.layout.describe()}{where} {self.recompute} {length} x{self.batches}"


def points() -> Iterator[Point]:
    """The grid."""
    small, one, three, eight = "SmolLM2-135M", "Llama-3.2-1B", "Llama-3.2-3B", "Llama-3-8B"
    fsdp8, fsdp64 = Layout(dp_shard=8), Layout(dp_shard=64)
    for recompute in ("none", "selective", "full"):
        yield Point(small, "full", Layout(), recompute, (2048,) * 4)
        yield Point(one, "full", Layout(), recompute)
        yield Point(one, "lora", Layout(), recompute, (512,) * 16)
        yield Point(three, "lora", Layout(), recompute)
        yield Point(three, "full", fsdp8, recompute)
        yield Point(eight, "qlora", Layout(), recompute, (1024,) * 2)
        yield Point(eight, "lora", Layout(tp=2), recompute)
        yield Point(eight, "full", Layout(tp=8), recompute)
        yield Point(eight, "full", Layout(dp_shard=4, tp=2), recompute)
    for tuning in ("full", "pure", "lora", "qlora"):
        yield Point(eight, tuning, fsdp8, "full")
        yield Point(eight, tuning, fsdp64, "full", (1024,))
        yield Point(eight, tuning, Layout(tp=8), "none", (1024,))
        for stage in (0, 3):
            yield Point(eight, tuning, Layout(pp=4), "full", batches=4, stage=stage)
        yield Point(eight, tuning, Layout(dp_shard=2, tp=2, pp=2), "full", batches=2)
        yield Point(eight, tuning, Layout(cp=4, cp_shards=True), "full", (32768,))
    yield Point(eight, "lora", Layout(), "full", (16384,))
    yield Point(eight, "lora", Layout(), "selective", (16384,))
    yield Point(eight, "qlora", Layout(), "full", (32768,))
    yield Point(one, "full", Layout(), "full", (16384,))
    yield Point(one, "pure", Layout(), "none", (1024,))
    yield Point(three, "full", Layout(), "full", (4096,), 2)
    yield Point(three, "full", Layout(dp_shard=8, zero=1), "full", batches=2)
    yield Point(three, "full", Layout(dp_shard=8, zero=2), "full", batches=2)
    yield Point(three, "lora", Layout(dp_replicate=8), "none")
    yield Point(eight, "lora", Layout(pp=4, pp_schedule="gpipe"), "full", batches=8)
    yield Point(eight, "lora", Layout(pp=4, pp_schedule="interleaved_1f1b"), "full", batches=8)
    experts = "Qwen3-30B-A3B"
    for tuning in ("full", "lora"):
        yield Point(experts, tuning, Layout(dp_shard=8, ep=8), "full", layers=16)
        yield Point(experts, tuning, Layout(dp_shard=8), "full", layers=8)
        yield Point(experts, tuning, Layout(), "none", (2048,), layers=4)
        yield Point(experts, tuning, Layout(tp=2), "selective", (2048,), layers=4)
    yield Point("Llama-3.1-70B", "lora", Layout(dp_shard=8), "full")
    yield Point("Llama-3.1-70B", "full", fsdp64, "full")
    yield Point("Llama-3.1-70B", "qlora", Layout(tp=8), "full")
    yield Point("Llama-3.1-70B", "full", Layout(dp_shard=8, tp=8), "full")


def folder_of(point: Point, scratch: Path) -> Path:
    """The model's folder, with fewer layers if the point says so."""
    source = MODELS / point.model
    if not point.layers:
        return source
    folder = scratch / f"{point.model}-{point.layers}"
    folder.mkdir(exist_ok=True)
    entries = json.loads((source / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**entries, "num_hidden_layers": point.layers}), encoding="utf-8")
    return folder


def measure(point: Point, scratch: Path, device: torch.device | None) -> dict[str, Any]:
    """One point: what was measured, and what is predicted."""
    folder = folder_of(point, scratch)
    run = load({"model_name_or_path": str(folder), **TUNINGS[point.tuning]})
    shape = read_shape(AutoConfig.from_pretrained(folder))
    tokens = sum(point.sequences)
    job = replace(
        Job.of(run),
        sequence=point.sequences[0],
        micro_batch=tokens,
        sequences_per_step=len(point.sequences) * point.batches * point.layout.dp,
    )
    stride = point.layout.world_size // point.layout.pp
    started = time.perf_counter()
    found = rehearse(
        run,
        point.layout,
        Workload(point.sequences, point.batches),
        rank=point.stage * stride,
        recompute=point.recompute,
        device=device,
        steps=2 if device is None else 4,
    )
    card = None if device is None else find_device(torch.cuda.get_device_name(device))
    memory = estimate_memory(shape, job, point.layout, point.recompute, tokens, rank=point.stage, device=card)
    return {
        "measured_gib": found.peak.total / GIB,
        "reserved_gib": None if found.reserved is None else found.reserved / GIB,
        "predicted_gib": memory.allocated / GIB,
        "predicted_reserved_gib": memory.reserved / GIB,
        "terms_gib": {name: size / GIB for name, size in memory.terms.items()},
        "phase": found.peak.phase,
        "step_s": found.step_s,
        "tokens": found.tokens,
        "took_s": time.perf_counter() - started,
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Signed errors in per cent of what was measured."""
    good = [row for row in rows if "measured_gib" in row]
    errors = sorted(100 * (row["predicted_gib"] / row["measured_gib"] - 1) for row in good)
    sizes = sorted(map(abs, errors))
    found = {
        "points": len(good),
        "failed": len(rows) - len(good),
        "median_error_percent": statistics.median(sizes),
        "p95_error_percent": sizes[math.ceil(0.95 * len(sizes)) - 1],
        "most_under_percent": errors[0],
        "most_over_percent": errors[-1],
    }
    reserved = sorted(
        abs(100 * (row["predicted_reserved_gib"] / row["reserved_gib"] - 1)) for row in good if row["reserved_gib"]
    )
    if reserved:
        found["median_reserved_error_percent"] = statistics.median(reserved)
        found["p95_reserved_error_percent"] = reserved[math.ceil(0.95 * len(reserved)) - 1]
    return found


def main() -> None:
    """Run what is missing, then report on all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fake", action="store_true", help="tensors without numbers, on a CPU")
    parser.add_argument("--only", default="", help="points whose name has this in it")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which no point is begun")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/memory_grid.jsonl"))
    args = parser.parse_args()
    device = None if args.fake else torch.device("cuda", 0)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    known = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    done = {row["point"] for row in known}
    deadline = time.monotonic() + args.budget
    with tempfile.TemporaryDirectory() as scratch, args.out.open("a", encoding="utf-8") as out:
        for point in points():
            if point.name in done or args.only not in point.name or time.monotonic() > deadline:
                continue
            try:
                row = {"point": point.name, **measure(point, Path(scratch), device)}
                error = 100 * (row["predicted_gib"] / row["measured_gib"] - 1)
                print(f"{error:+6.1f} %  {row['measured_gib']:7.2f} GiB  {point.name}", flush=True)
            except Exception:
                row = {"point": point.name, "error": traceback.format_exc()[-1500:]}
                print(f"failed  {point.name}: {row['error'].splitlines()[-1]}", flush=True)
            known.append(row)
            out.write(json.dumps(row) + "\n")
            out.flush()
            gc.collect()
            if device is not None:
                torch.cuda.empty_cache()
    print(json.dumps({"environment": environment(), **summary(known)}, indent=1))


if __name__ == "__main__":
    main()
