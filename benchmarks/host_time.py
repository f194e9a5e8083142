"""What the host takes to drive a layer, where the device is faster: seconds a layer and micro-batch.

    python benchmarks/host_time.py [--only TEXT] [--budget SECONDS] [--out FILE]

Short rows, so that a GPU waits for the host, of a model cut to 4 and to 8 layers, for each tuning and recompute: the
difference is four layers, the rest is what is outside them. Constants of `planning/kernels.py` come from here. How
points run: `rehearsed.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from environment import environment
from fourfold.planning.job import RECOMPUTES
from fourfold.planning.layout import Layout
from rehearsed import TUNINGS, Point, arguments, run_points

MODEL, LENGTH, BATCHES = "Llama-3.2-1B", 64, 4


def point(tuning: str, recompute: str, layers: int) -> Point:
    """Of the grid."""
    return Point(MODEL, tuning, Layout(), recompute, (LENGTH,), BATCHES, layers=layers)  # type: ignore[arg-type]


def points() -> Iterator[Point]:
    """All of them."""
    for tuning in TUNINGS:
        for recompute in RECOMPUTES:
            for layers in (4, 8):
                yield point(tuning, recompute, layers)
    for layers in (2, 4):
        yield Point("Qwen3-30B-A3B", "lora", Layout(), "none", (LENGTH,), BATCHES, layers=layers)


def main() -> None:
    """Run what is missing, then say what a layer and the rest take."""
    rows = {row["point"]: row for row in run_points(points(), arguments(__doc__, "host_time").parse_args())}
    found = {}
    for tuning in TUNINGS:
        for recompute in RECOMPUTES:
            four, eight = (rows.get(point(tuning, recompute, n).name, {}).get("step_s") for n in (4, 8))
            if four and eight:
                layer = (eight - four) / 4 / BATCHES
                found[f"{tuning} {recompute}"] = {
                    "layer_ms": 1e3 * layer,
                    "rest_ms": 1e3 * (four / BATCHES - 4 * layer),
                }
    print(json.dumps({"environment": environment(), "host": found}, indent=1))


if __name__ == "__main__":
    main()
