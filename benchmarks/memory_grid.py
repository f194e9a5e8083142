"""Predicted against measured memory, over models, tunings, layouts, recompute and lengths.

    python benchmarks/memory_grid.py [--check] [--fake] [--only TEXT] [--budget SECONDS] [--out FILE]

The planner's formulas were corrected with runs of the first grid; `--check` runs another one, of other lengths, degrees
and models, which they have not seen. At the end: signed errors of `planning/memory.py`, their median and 95th
percentile, and the worst. How points run: `rehearsed.py`.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator
from typing import Any

from environment import environment
from fourfold.planning.layout import Layout
from rehearsed import Point, arguments, run_points


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
    yield Point(eight, "lora", Layout(pp=8), "none", batches=8)
    yield Point("Llama-3.1-70B", "lora", Layout(dp_shard=8), "full")
    yield Point("Llama-3.1-70B", "full", fsdp64, "full")
    yield Point("Llama-3.1-70B", "qlora", Layout(tp=8), "full")
    yield Point("Llama-3.1-70B", "full", Layout(dp_shard=8, tp=8), "full")


def check_points() -> Iterator[Point]:
    """The second grid."""
    small, one, three, eight, other = "SmolLM2-135M", "Llama-3.2-1B", "Llama-3.2-3B", "Llama-3-8B", "Qwen3-8B"
    for recompute in ("none", "selective", "full"):
        yield Point(small, "full", Layout(), recompute, (512,) * 8)
        yield Point(small, "lora", Layout(), recompute, (1024,) * 16)
        yield Point(one, "pure", Layout(), recompute, (8192,))
        yield Point(three, "qlora", Layout(), recompute, (2048,) * 2)
        yield Point(three, "full", Layout(dp_shard=16), recompute, (2048,))
        yield Point(eight, "lora", Layout(dp_shard=4), recompute, (2048,))
        yield Point(eight, "pure", Layout(tp=4), recompute, (2048,))
        yield Point(other, "lora", Layout(dp_shard=2, tp=2), recompute, (3072,))
        yield Point(other, "full", Layout(tp=8), recompute, (8192,))
    for tuning in ("full", "pure", "lora", "qlora"):
        yield Point(other, tuning, Layout(dp_shard=16), "full", (8192,))
        yield Point(other, tuning, Layout(dp_shard=64), "selective", (2048,))
        yield Point(other, tuning, Layout(tp=4), "full", (1024,) * 4)
        for stage in (0, 3):
            yield Point(other, tuning, Layout(pp=4), "selective", (2048,), 6, stage=stage)
        yield Point(other, tuning, Layout(dp_shard=4, tp=2, pp=2), "full", (2048,), 4, stage=1)
        yield Point(other, tuning, Layout(cp=8, cp_shards=True), "full", (65536,))
    yield Point(other, "lora", Layout(), "full", (24576,))
    yield Point(other, "qlora", Layout(), "selective", (4096,) * 2)
    yield Point(one, "lora", Layout(), "none", (16384,))
    yield Point(three, "full", Layout(dp_shard=4, zero=2), "selective", (2048,), 4)
    yield Point(eight, "lora", Layout(pp=2, pp_schedule="zbv"), "full", (2048,), 4)
    experts = "Qwen3-30B-A3B"
    for tuning in ("full", "lora"):
        yield Point(experts, tuning, Layout(dp_shard=4, ep=4), "full", (2048,), layers=8)
        yield Point(experts, tuning, Layout(dp_shard=16), "selective", (2048,), layers=12)
        yield Point(experts, tuning, Layout(), "full", (4096,), layers=3)
    yield Point("Llama-3.1-70B", "lora", Layout(dp_shard=8, tp=2), "full", (2048,))
    yield Point("Llama-3.1-70B", "qlora", Layout(dp_shard=16), "full", (2048,))


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
    errors = sorted(
        100 * (row["predicted_reserved_gib"] / row["reserved_gib"] - 1) for row in good if row.get("reserved_gib")
    )
    if errors:
        sizes = sorted(map(abs, errors))
        found["median_reserved_error_percent"] = statistics.median(sizes)
        found["p95_reserved_error_percent"] = sizes[math.ceil(0.95 * len(sizes)) - 1]
        found["most_reserved_under_percent"] = errors[0]
    return found


def main() -> None:
    """Run what is missing, then report on all."""
    parser = arguments(__doc__, "memory_grid")
    parser.add_argument("--check", action="store_true", help="the second grid")
    args = parser.parse_args()
    rows = run_points(check_points() if args.check else points(), args)
    print(json.dumps({"environment": environment(), **summary(rows)}, indent=1))


if __name__ == "__main__":
    main()
