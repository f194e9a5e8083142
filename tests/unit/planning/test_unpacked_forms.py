"""4-bit weights that stay unpacked where there is room: faster, and part of what a plan says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from fourfold.planning.hardware import build_cluster
from fourfold.planning.job import Job
from fourfold.planning.keeps import may_unpack
from fourfold.planning.layout import Layout
from fourfold.planning.search import search
from fourfold.planning.shape import ModelShape

_JOB = Job(bits=4, sequence=512, micro_batch=1024, sequences_per_step=4)


def test_plan_when_there_is_room_unpacks_once_and_says_so(shape_of: Callable[[str], ModelShape]) -> None:
    shape = shape_of("Llama-3-8B")
    best = search(shape, _JOB, build_cluster("h100")).best
    plain = search(shape, replace(_JOB, bits=None), build_cluster("h100")).best
    assert best is not None
    assert plain is not None
    assert best.keeps.unpacked
    assert "unpacked once" in best.reason
    assert best.as_json()["layout"]["unpacked"] is True
    assert (best.memory, best.cost) == (plain.memory, plain.cost)  # LoRA's speed


def test_plan_when_there_is_no_room_or_ranks_gather_weights_leaves_them_packed(
    shape_of: Callable[[str], ModelShape],
) -> None:
    shape = shape_of("Llama-3-8B")
    large = search(shape_of("Llama-3-70B"), _JOB, build_cluster("h100")).best
    assert large is not None
    assert not large.keeps.unpacked
    low = search(shape, replace(_JOB, host_embedding=True), build_cluster("h100")).best
    assert low is not None
    assert not low.keeps.unpacked
    several = search(shape, _JOB, build_cluster("h100", 8))
    assert {found.keeps.unpacked for found in several.layouts if found.layout.shards > 1} <= {False}


def test_plan_when_ranks_share_or_stage_the_model_unpacks_their_parts(
    shape_of: Callable[[str], ModelShape],
) -> None:
    job = replace(_JOB, sequences_per_step=64)
    several = search(shape_of("Llama-3-70B"), job, build_cluster("h100", 8))
    assert {found.keeps.unpacked for found in several.layouts if found.layout.pp == 8} == {True}
    assert not may_unpack(_JOB, Layout(pp=2, pp_schedule="zbv"))
    assert may_unpack(_JOB, Layout(pp=2, tp=2))
