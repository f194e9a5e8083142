"""The report of a plan, as text, JSON and a picture."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fourfold.base.errors import PlanError
from fourfold.config.load import load
from fourfold.planning.draw import draw
from fourfold.planning.hardware import build_cluster
from fourfold.planning.job import Job
from fourfold.planning.layout import resolve_layout
from fourfold.planning.report import as_json, as_text
from fourfold.planning.search import search
from fourfold.planning.shape import ModelShape

ShapeOf = Callable[[str], ModelShape]

FULL = Job(tuning="full", sequence=4096, micro_batch=8192, sequences_per_step=1024)

CASES = [
    ("SmolLM2-135M", FULL, "rtx4090", 1, 1),
    ("Llama-3-8B", FULL, "h100", 8, 1),
    ("Llama-3-8B", FULL, "rtx4090", 2, 1),
    ("Llama-3-70B", replace(FULL, tuning="lora", bits=4), "h100", 8, 1),
    ("one-huge-matrix", FULL, "h100", 8, 1),
    ("Qwen3-30B-A3B", FULL, "b200", 8, 16),
    ("DeepSeek-V3", replace(FULL, sequence=32768, micro_batch=32768), "h100", 8, 128),
]


@pytest.mark.parametrize(("name", "job", "gpu", "gpus", "nodes"), CASES)
def test_text_when_printed_has_its_parts_in_order_within_80_columns(
    name: str, job: Job, gpu: str, gpus: int, nodes: int, shape_of: ShapeOf
) -> None:
    plan = search(shape_of(name), job, build_cluster(gpu, gpus, nodes))
    lines = as_text(plan).splitlines()
    assert [line for line in lines if len(line) > 80] == []
    starts = ["ANATOMY", "THE FOUR CASES"]
    starts += ["LAYOUTS", "MEMORY", "DROPPED", "CONFIG"] if plan.layouts else ["DROPPED", "NOTHING FITS"]
    assert [line for line in lines if line[:3].isupper() and line[0] != " "] == [
        next(line for line in lines if line.startswith(start)) for start in starts
    ]


@pytest.mark.parametrize(("name", "job", "gpu", "gpus", "nodes"), CASES)
def test_json_when_printed_has_its_keys_and_a_config_that_is_the_best(
    name: str, job: Job, gpu: str, gpus: int, nodes: int, shape_of: ShapeOf
) -> None:
    plan = search(shape_of(name), job, build_cluster(gpu, gpus, nodes))
    found = json.loads(json.dumps(as_json(plan), allow_nan=False))
    keys = ["anatomy", "cases", "layouts", "best", "rejected", "config"]
    if plan.best is None:
        assert list(found) == [*keys, "changes"]
        assert (found["best"], found["layouts"], found["config"]) == (None, [], {})
        return
    assert list(found) == keys
    assert found["best"] == found["layouts"][0]
    config = load(found["config"])
    assert resolve_layout(config.parallel, gpus * nodes) == plan.best.layout
    best = found["best"]["layout"]
    assert config.parallel.recompute == ("auto" if best["spared"] else best["recompute"])
    assert config.training.micro_batch_tokens == found["best"]["layout"]["micro_batch"]
    terms = {"context", "slack"}
    allocated = sum(size for term, size in found["best"]["memory_gib"].items() if term not in terms)
    assert allocated == pytest.approx(found["best"]["allocated_gib"])


def test_anatomy_when_the_model_is_trained_in_full_is_as_counted_by_hand(shape_of: ShapeOf) -> None:
    found = as_json(search(shape_of("Llama-3-8B"), FULL, build_cluster("h100", 8)))["anatomy"]
    assert (found["layers"], found["parameters"], found["trained_share"]) == (32, 8_030_261_248, 1.0)
    assert found["memory_gib"]["optimizer"] == pytest.approx(8 * 8_030_261_248 / 2**30)
    assert found["largest_matrix"]["parameters"] == 128_256 * 4096


def test_anatomy_when_adapters_are_trained_counts_them(shape_of: ShapeOf) -> None:
    job = replace(FULL, tuning="lora", lora_rank=8)
    found = as_json(search(shape_of("Llama-3-8B"), job, build_cluster("h100", 8)))["anatomy"]
    hidden, kv, inner = 4096, 1024, 14336
    # q and o, k and v, gate and up and down: rank times (in + out) each
    layer = 2 * (hidden + hidden) + 2 * (hidden + kv) + 3 * (hidden + inner)
    assert found["trained_parameters"] == 32 * 8 * layer


def test_picture_when_drawn_is_a_png(tmp_path: Path, shape_of: ShapeOf) -> None:
    plan = search(shape_of("Llama-3-8B"), FULL, build_cluster("h100", 8))
    draw(plan, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["plan.nothing", "missing/plan.png"])
def test_picture_when_it_cannot_be_written_is_refused(tmp_path: Path, name: str, shape_of: ShapeOf) -> None:
    plan = search(shape_of("Llama-3-8B"), FULL, build_cluster("rtx4090"), rescue=False)
    with pytest.raises(PlanError, match="cannot be written"):
        draw(plan, tmp_path / name)
