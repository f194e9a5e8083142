"""Predictions against what 4 H100s and 4 H200s measured through NCCL (benchmarks/results/multi_gpu_4x*.json)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fourfold.planning.hardware import find_device
from multi_predict import outlook_of, predict
from rehearsed import GIB, point_of

_RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"


def _rows(card: str) -> dict[str, dict[str, Any]]:
    """What was measured on four of a card, by the names of the cases."""
    rows = json.loads((_RESULTS / f"multi_gpu_4x{card}.json").read_text(encoding="utf-8"))["rows"]
    return {
        name.removeprefix("throughput/4/"): {**row, "card": card}
        for name, row in rows.items()
        if name.startswith("throughput/")
    }


_ON_H100 = _rows("h100")
_ROWS = _ON_H100 | {f"{name} on h200": row for name, row in _rows("h200").items()}
_MOST_UNDER, _MOST_OVER, _TIME = 0.05, 0.07, 0.15
_FARTHER = {"8b-qlora-tp4": 0.775, "8b-qlora-tp4-compiled": 0.696, "30b-16layers-full-fsdp4-compiled on h200": 1.163}
"""Predicted over measured time of what is off by more. The host sets the pace of the first, which was found to take 8.1
us for an operator after it, 11.5 us after others: its steps took 0.54 to 0.64 s; and of the second, measured while an
engine still waited for the device in each micro-batch: on 4 H200, without, it is 0.87. The third is 16 % faster than
predicted, on 4 H100 2 %."""
_LESS_NEAR = {"30b-16layers-full-fsdp4": 0.025}
"""Predicted over measured memory."""


_HELD_OTHERWISE = {
    "70b-qlora-fsdp4": 0.91,
    "8b-lora-64k-cp4-allgather-compiled": 1.122,
    "8b-lora-64k-cp4-ulysses-compiled": 1.086,
    "8b-lora-64k-cp4-ring": 0.881,
    "30b-16layers-full-ep4": 0.94,
    "70b-40layers-lora-fsdp4-compiled": 1.074,
    "30b-16layers-full-fsdp4-compiled on h200": 0.925,
}
"""Predicted over measured reserved memory of what the allocator held more of than is known why: 2.8 GiB of 31.0, the
same before and after pieces that loading leaves were given back; 2.4 of 20.2 around the ring; and 3.6 of 52.7 beside
experts that one rank each holds. And less of 15.7 around compiled layers whose ranks share positions, and of 49.7 for
layers of 1.6 GiB: 3.3 not allocated, where 6.8 are predicted."""


def test_rows_are_those_of_every_layout_that_ran() -> None:
    assert len(_ON_H100) == 39
    assert len(_ROWS) == 48
    assert all(row["losses_finite"] for row in _ROWS.values())


@pytest.mark.parametrize("name", _ROWS)
def test_memory_when_compared_with_every_rank_is_within_the_tolerance(name: str) -> None:
    row, card = _ROWS[name], find_device(_ROWS[name]["card"])
    point = point_of(row["fields"])
    ranks = len(row["allocated_gib"]) // point.layout.pp
    for stage in range(point.layout.pp):
        found = outlook_of(point, card, stage).memory_of_rank(point.recompute, sum(point.sequences))
        own = slice(stage * ranks, (stage + 1) * ranks)
        allocated = found.allocated / GIB / max(row["allocated_gib"][own])
        assert 1 - _MOST_UNDER <= allocated <= 1 + _MOST_OVER
        if "reserved_gib" not in row:  # measured while gradients lay apart
            continue
        reserved = found.reserved / GIB / max(row["reserved_gib"][own])
        if name in _HELD_OTHERWISE:
            assert reserved == pytest.approx(_HELD_OTHERWISE[name], abs=0.01)
        else:
            assert 1 - _MOST_UNDER <= reserved <= 1 + _MOST_OVER


@pytest.mark.parametrize("name", _ROWS)
def test_most_loaded_rank_when_none_is_named_is_the_one_that_held_most(name: str) -> None:
    found = predict(_ROWS[name], _ROWS[name]["card"])
    near = _LESS_NEAR.get(name, _MOST_OVER if "compiled" in name else 0.02)  # what a compiler keeps is known less well
    assert found["predicted_allocated_gib"] == pytest.approx(max(_ROWS[name]["allocated_gib"]), rel=near)


@pytest.mark.parametrize("name", _ROWS)
def test_step_time_when_compared_with_measured_layouts_is_within_the_tolerance(name: str) -> None:
    row = _ROWS[name]
    ratio = predict(row, row["card"])["predicted_step_s"] / row["step_s"]
    if name in _FARTHER:
        assert ratio == pytest.approx(_FARTHER[name], abs=0.01)
    else:
        assert abs(ratio - 1) <= _TIME


def test_step_time_when_layouts_of_one_job_are_compared_ranks_them_as_they_were() -> None:
    for names in (
        ("8b-lora-ddp4", "8b-lora-fsdp4"),
        ("8b-lora-pp4-1f1b", "8b-lora-pp4-zbv"),
        ("8b-lora-tp4-compiled", "8b-qlora-tp4-compiled"),
        ("70b-40layers-lora-pp4-1f1b-compiled", "70b-40layers-lora-fsdp4-compiled"),
    ):
        measured = [_ROWS[name]["step_s"] for name in names]
        predicted = [predict(_ROWS[name], "h100")["predicted_step_s"] for name in names]
        assert measured == sorted(measured)
        assert predicted == sorted(predicted)


def test_step_time_when_the_host_is_slower_is_longer_under_tensor_parallelism() -> None:
    row = _ROWS["8b-qlora-tp4"]
    quick, slow = (predict(row | {"host_op_us": us}, "h100")["predicted_step_s"] for us in (8.1, 11.5))
    assert slow > 1.2 * quick
