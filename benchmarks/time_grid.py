"""Predicted against measured step time of what one GPU can run whole, and whether layouts rank as they run.

    python benchmarks/time_grid.py [--check] [--only TEXT] [--budget SECONDS] [--out FILE]

Points of a group do the same work in a step (the same model, tuning and sequences), cut or recomputed differently:
their order is what the planner chooses by. `--check` runs other groups than those the constants were fitted with. At
the end: errors, and for each two of a group whether the faster one was
predicted to be. How points run: `rehearsed.py`.
"""

from __future__ import annotations

import itertools
import json
import statistics
from typing import Any

from environment import environment
from fourfold.planning.job import RECOMPUTES
from fourfold.planning.layout import Layout
from rehearsed import Point, arguments, run_points

ALIKE_PERCENT = 2.0
"""Two layouts whose measured times differ by less have no order."""


def groups() -> list[list[Point]]:
    """Points by work."""
    small, one, three, eight, none = "SmolLM2-135M", "Llama-3.2-1B", "Llama-3.2-3B", "Llama-3-8B", Layout()
    found = [
        [Point(model, tuning, none, recompute, lengths) for recompute in RECOMPUTES]
        for model, tuning, lengths in (
            (small, "full", (2048,) * 8),
            (one, "full", (4096,) * 2),
            (one, "lora", (4096,) * 2),
            (three, "pure", (4096,)),
            (three, "lora", (512,) * 16),
            (eight, "lora", (4096,) * 2),
            (eight, "qlora", (4096,)),
        )
    ]
    for model, tuning, length, count in (
        (one, "full", 1024, 8),
        (three, "lora", 1024, 8),
        (eight, "lora", 512, 8),
        (eight, "qlora", 512, 8),
    ):
        shares = [share for share in (1, 2, 4, 8) if share <= count]
        found.append([Point(model, tuning, none, "none", (length,) * (count // share), share) for share in shares])
    found.append([Point(eight, "lora", none, "full", (16384,))])
    found.append([Point(one, "full", none, "full", (32768,))])
    return found


def check_groups() -> list[list[Point]]:
    """The second set of points by work."""
    one, three, eight, other, none = "Llama-3.2-1B", "Llama-3.2-3B", "Llama-3-8B", "Qwen3-8B", Layout()
    return [
        *(
            [Point(model, tuning, none, recompute, lengths) for recompute in RECOMPUTES]
            for model, tuning, lengths in (
                (one, "pure", (2048,) * 4),
                (three, "lora", (2048,) * 4),
                (other, "lora", (2048,) * 3),
                (eight, "qlora", (1024,) * 6),
            )
        ),
        [Point(one, "full", none, "none", (2048,) * (8 // share), share) for share in (1, 2, 4)],
        [Point(other, "lora", none, "none", (256,) * (16 // share), share) for share in (1, 2, 4, 8)],
        [Point(three, "qlora", none, "selective", (1024,) * (8 // share), share) for share in (1, 2, 4)],
    ]


def ranking(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Of each two points of a group, whether they rank as predicted."""
    right, wrong, alike = 0, [], 0
    for group in (*groups(), *check_groups()):
        timed = [rows[point.name] for point in group if rows.get(point.name, {}).get("step_s")]
        for first, second in itertools.combinations(timed, 2):
            ratio = first["step_s"] / second["step_s"]
            if abs(ratio - 1) * 100 < ALIKE_PERCENT:
                alike += 1
            elif (ratio > 1) == (first["predicted_step_s"] > second["predicted_step_s"]):
                right += 1
            else:
                predicted = first["predicted_step_s"] / second["predicted_step_s"]
                wrong.append(f"{first['point']} / {second['point']}: {ratio:.3f} measured, {predicted:.3f} predicted")
    return {"pairs_right": right, "pairs_alike": alike, "pairs_wrong": wrong}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Signed errors in per cent of what was measured, and the ranking."""
    good = [row for row in rows if row.get("step_s") and row.get("predicted_step_s")]
    errors = [100 * (row["predicted_step_s"] / row["step_s"] - 1) for row in good]
    return {
        "points": len(good),
        "failed": len(rows) - len(good),
        "median_error_percent": statistics.median(map(abs, errors)),
        "median_signed_error_percent": statistics.median(errors),
        "most_under_percent": min(errors),
        "most_over_percent": max(errors),
        **ranking({row["point"]: row for row in good}),
    }


def main() -> None:
    """Run what is missing, then report on all."""
    parser = arguments(__doc__, "time_grid")
    parser.add_argument("--check", action="store_true", help="the second set of groups")
    args = parser.parse_args()
    rows = run_points(itertools.chain(*(check_groups() if args.check else groups())), args)
    if not args.fake:
        print(json.dumps({"environment": environment(), **summary(rows)}, indent=1))


if __name__ == "__main__":
    main()
