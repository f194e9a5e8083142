"""Whether the rows of multi_gpu.py are within the tolerances and reach the targets, one line for each question.

Predictions are judged as the planner's are elsewhere: memory within 3 % in the median, 7 % at the 95th percentile and
never more than 5 % too low; the time of every step within 15 %; a bubble within 20 % of its formula.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from multi_faults import END_WITHIN_S, SAVED, STEPS, TOLERANCE
from multi_layouts import NORM_TOLERANCE, TOLERANCES, parse
from multi_results import FAILURES, is_failure
from multi_speeds import SPEEDS

STEP_PERCENT, BUBBLE_PERCENT, WEAK_SCALING = 15.0, 20.0, 0.95
_MEDIAN_PERCENT, _MOST_PERCENT, _UNDER_PERCENT = 3.0, 7.0, -5.0

Rows = Mapping[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Verdict:
    """An answer.

    Attributes:
        what: of a row, or of all.
        passed: False, too, where a figure is NaN.
        figure: in words.
    """

    what: str
    passed: bool
    figure: str

    def __str__(self) -> str:
        return f"{'ok  ' if self.passed else 'FAIL'}  {self.what:64} {self.figure}"


def at_most(what: str, value: float, limit: float, unit: str = "") -> Verdict:
    """Whether a figure is small enough."""
    return Verdict(what, value <= limit, f"{value:.3g}{unit} (at most {limit:g}{unit})")


def at_least(what: str, value: float, limit: float, unit: str = "") -> Verdict:
    """Whether a figure is large enough."""
    return Verdict(what, value >= limit, f"{value:.4g}{unit} (at least {limit:g}{unit})")


def errors(row: dict[str, Any]) -> dict[str, float]:
    """By how many per cent each prediction is above what was measured, of the most loaded rank."""
    pairs = {
        "allocated": ("predicted_allocated_gib", max(row.get("allocated_gib") or [0.0])),
        "reserved": ("predicted_reserved_gib", max(row.get("reserved_gib") or [0.0])),
        "step": ("predicted_step_s", row.get("step_s", 0.0)),
    }
    return {name: 100 * (row[key] / measured - 1) for name, (key, measured) in pairs.items() if key in row and measured}


def verdicts(rows: Rows) -> Iterator[Verdict]:
    """Every answer that the rows allow."""
    for name, row in rows.items():
        if is_failure(row):
            reason = next(str(row[key]) for key in FAILURES if key in row)
            yield Verdict(name, False, (reason.splitlines() or ["?"])[-1][:200])
        else:
            yield from _OF_KIND[name.split("/")[0]](name, row, rows)
    yield from _memory(rows)


def _equality(name: str, row: dict[str, Any], rows: Rows) -> Iterator[Verdict]:
    if "largest_difference" not in row:  # what one GPU did
        yield Verdict(name, all(map(math.isfinite, row["losses"])), "losses are numbers")
        return
    variant, _ = parse(name)
    key, limit = TOLERANCES[variant.precision]
    yield at_most(f"{name}: {key}", row[key], limit)
    if variant.precision == "fp32":
        yield at_most(f"{name}: gradient norms", row["largest_norm_difference"], NORM_TOLERANCE)


def _throughput(name: str, row: dict[str, Any], rows: Rows) -> Iterator[Verdict]:
    _, ranks, case = name.split("/")
    yield Verdict(f"{name}: losses are numbers", row["losses_finite"], f"{row['losses'][-1]:.4g}")
    if row["is_tiny"]:
        return
    if "step" in (off := errors(row)):
        yield at_most(f"{name}: step predicted", abs(off["step"]), STEP_PERCENT, " %")
    bubble = row.get("bubble")
    if bubble is not None and row.get("predicted_bubble"):
        apart = 100 * abs(bubble / row["predicted_bubble"] - 1)
        yield at_most(f"{name}: bubble {bubble:.3f} beside the formula's", apart, BUBBLE_PERCENT, " %")
    target = SPEEDS[case].target
    if target is not None:
        yield at_least(f"{name}: tokens/s of a GPU", row["tokens_per_sec_per_gpu"], target)
    one = rows.get(f"throughput/{ranks}/8b-lora-one", {})
    if case == f"8b-lora-ddp{ranks}" and "tokens_per_sec_per_gpu" in one:
        share = row["tokens_per_sec_per_gpu"] / one["tokens_per_sec_per_gpu"]
        yield at_least(f"{name}: weak scaling from one GPU", share, WEAK_SCALING)


def _memory(rows: Rows) -> Iterator[Verdict]:
    """Predicted memory, over all rows."""
    found = [
        errors(row)
        for name, row in rows.items()
        if name.startswith("throughput/") and not is_failure(row) and not row["is_tiny"]
    ]
    for kind in ("allocated", "reserved"):
        off = sorted(one[kind] for one in found if kind in one)
        if off:
            sizes = sorted(map(abs, off))
            worst = sizes[math.ceil(0.95 * len(sizes)) - 1]
            yield at_most(f"memory {kind}, predicted, median of {len(off)}", median(sizes), _MEDIAN_PERCENT, " %")
            yield at_most(f"memory {kind}, predicted, 95th percentile", worst, _MOST_PERCENT, " %")
            yield at_least(f"memory {kind}, predicted, most under", off[0], _UNDER_PERCENT, " %")


def _links(name: str, row: dict[str, Any], rows: Rows) -> Iterator[Verdict]:
    figure = f"{row['link_gb_s']:.4g} GB/s, {row['latency_us']:.1f} us a hop"
    yield Verdict(f"{name}: measured", row["link_gb_s"] > 0, figure)


def _command(name: str, row: dict[str, Any], rows: Rows) -> Iterator[Verdict]:
    one = rows.get(f"{name.rsplit('/', 1)[0]}/one", {})
    if "losses" not in one:
        return
    apart = max(abs(a - b) for a, b in zip(row["losses"], one["losses"], strict=True))
    yield at_most(f"{name}: losses beside one process's", apart, TOLERANCE)


def _kill(name: str, row: dict[str, Any], rows: Rows) -> Iterator[Verdict]:
    yield at_most(f"{name}: ended", row["ended_after_s"], END_WITHIN_S, " s")
    told = "SIGKILL" in row["cause"] and row["exit_code"] not in (0, None)
    yield Verdict(f"{name}: cause told", told, f"exit code {row['exit_code']}: {row['cause']}")
    yield Verdict(f"{name}: nothing left running", not row["left_running"], str(row["left_running"] or "nothing"))
    yield at_most(f"{name}: losses before", row["largest_difference_before"], TOLERANCE)
    went_on = row["resumed_at_step"] == SAVED and row["resumed_steps"] == STEPS
    yield Verdict(f"{name}: went on to the end", went_on, f"from step {row['resumed_at_step']}")
    yield at_most(f"{name}: losses after resuming", row["largest_resumed_difference"], TOLERANCE)


def _resume(name: str, row: dict[str, Any], rows: Rows) -> Iterator[Verdict]:
    for ranks, one in row["resumed"].items():
        left = STEPS - SAVED
        yield Verdict(f"{name} on {ranks}: went on to the end", one["steps"] == left, f"{one['steps']} of {left} steps")
        yield at_most(f"{name} on {ranks}: losses after resuming", one["difference"], TOLERANCE)


_OF_KIND = {
    "equality": _equality,
    "throughput": _throughput,
    "links": _links,
    "command": _command,
    "kill": _kill,
    "resume": _resume,
}
