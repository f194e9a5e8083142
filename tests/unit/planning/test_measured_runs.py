"""Predictions against what an H100 and an H200 measured (benchmarks/results): the planner's own tolerances."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import time_grid
from fourfold.planning.cost import estimate_cost
from fourfold.planning.hardware import build_cluster, find_device
from fourfold.planning.layout import Layout
from fourfold.planning.memory import estimate_memory
from rehearsed import GIB, Point, described, point_of, predicted_memory, predictions

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"


def rows_of(name: str) -> list[dict[str, Any]]:
    """Runs of what the engine does today; those `before` a change of it wait to be measured again."""
    rows = [json.loads(line) for line in (RESULTS / name).read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if "before" not in row]


def percentile_95(values: list[float]) -> float:
    return sorted(values)[math.ceil(0.95 * len(values)) - 1]


@pytest.fixture(scope="module", params=[("memory_grid", 73), ("memory_check", 51)], ids=lambda param: param[0])
def memory_errors(request: pytest.FixtureRequest) -> list[tuple[float, float]]:
    """Signed, in per cent: of the allocator's peak, and of what it reserved."""
    name, least = request.param
    found = []
    for row in rows_of(f"{name}_h100.jsonl"):
        memory = predicted_memory(point_of(row["fields"]), find_device(row["gpu"]))
        allocated = memory.allocated / GIB / row["measured_gib"]
        reserved = memory.reserved / GIB / row["reserved_gib"]
        found.append((100 * (allocated - 1), 100 * (reserved - 1)))
    assert len(found) >= least
    return found


def test_allocated_when_compared_with_measured_runs_is_within_the_tolerance(
    memory_errors: list[tuple[float, float]],
) -> None:
    errors = [allocated for allocated, _ in memory_errors]
    assert statistics.median(map(abs, errors)) <= 3
    assert percentile_95(list(map(abs, errors))) <= 7
    assert min(errors) >= -5


def test_reserved_when_compared_with_measured_runs_is_within_the_tolerance(
    memory_errors: list[tuple[float, float]],
) -> None:
    errors = [reserved for _, reserved in memory_errors]
    assert statistics.median(map(abs, errors)) <= 3
    assert percentile_95(list(map(abs, errors))) <= 7
    assert min(errors) >= -5


@pytest.mark.parametrize(("name", "jobs", "wrong"), [("near_limit", 22, 0), ("near_limit_check", 15, 0)])
def test_verdict_when_compared_with_runs_near_the_limit_is_right(name: str, jobs: int, wrong: int) -> None:
    rows = rows_of(f"{name}_h100.jsonl")
    right = 0
    for row in rows:
        card = find_device(row["gpu"])
        fits = predicted_memory(point_of(row["fields"]), card).device <= card.memory_bytes
        right += fits == ("out_of_memory" not in row)
    assert len(rows) == jobs
    assert right >= jobs - wrong


@pytest.mark.parametrize(("name", "least", "pairs", "wrong"), [("time_grid", 36, 41, 0), ("time_check", 22, 24, 0)])
def test_step_time_when_compared_with_measured_runs_is_within_a_tenth_and_ranks_right(
    name: str, least: int, pairs: int, wrong: int
) -> None:
    rows = rows_of(f"{name}_h100.jsonl")
    for row in rows:
        row |= predictions(point_of(row["fields"]), row["gpu"], row["host_op_us"])
    found = time_grid.summary(rows)
    assert found["points"] >= least
    assert found["median_error_percent"] <= 10
    assert len(found["pairs_wrong"]) <= wrong
    assert found["pairs_right"] >= pairs


def test_points_when_read_back_have_the_name_they_ran_under() -> None:
    for row in rows_of("time_grid_h100.jsonl"):
        assert point_of(row["fields"]).name == row["point"]
        assert described(point_of(row["fields"]))[2].sequence == row["fields"]["sequences"][0]


@pytest.mark.parametrize("name", ["compiled_h100.jsonl", "compiled_h200.jsonl"])
def test_prediction_when_compared_with_compiled_runs_is_near(name: str) -> None:
    for row in rows_of(name):
        card = find_device(row["gpu"])
        point = Point(**{**row["fields"], "sequences": tuple(row["fields"]["sequences"]), "layout": Layout()})
        _, shape, job = described(point)
        job = replace(job, engine=row["engine"], **row.get("job", {}))
        tokens, cluster = sum(point.sequences), build_cluster(replace(card, host_op_s=row["host_op_us"] * 1e-6))
        if "measured_gib" in row:  # not where steps are of many sizes, nor where a layer works with 131,072 positions
            memory = estimate_memory(shape, job, Layout(), point.recompute, tokens, device=card)
            assert memory.allocated / GIB == pytest.approx(row["measured_gib"], rel=0.04)
        cost = estimate_cost(shape, job, Layout(), cluster, point.recompute, tokens)
        assert cost.step_s == pytest.approx(row["step_s"], rel=0.06)
