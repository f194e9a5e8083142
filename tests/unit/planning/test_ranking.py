"""Layouts are ranked by speed, less what their axes must gain."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fourfold.planning.candidates import simplicity
from fourfold.planning.hardware import Cluster, build_cluster
from fourfold.planning.job import Job
from fourfold.planning.layout import Layout
from fourfold.planning.predictor import Form, Predictor
from fourfold.planning.ranking import WORTH_AN_AXIS, burdens, ranked, speed, worth
from fourfold.planning.search import Plan, search
from fourfold.planning.shape import ModelShape
from fourfold.planning.wishes import Wishes

ShapeOf = Callable[[str], ModelShape]

NODE, NODES = build_cluster("h100", 8), build_cluster("h100", 8, 64)
FULL = Job(tuning="full", sequence=4096, micro_batch=8192, sequences_per_step=512)


@pytest.mark.parametrize(
    ("cluster", "layout", "count"),
    [
        (NODE, Layout(), 0),
        (NODE, Layout(dp_replicate=8), 0),
        (NODE, Layout(dp_shard=8), 1),
        (NODE, Layout(dp_shard=8, ep=8), 1),
        (NODE, Layout(dp_shard=4, tp=2), 2),
        (NODE, Layout(pp=8), 3),  # the next stage is in the node
        (NODES, Layout(dp_shard=64, pp=8), 2),  # and here in another one
        (NODES, Layout(dp_replicate=8, dp_shard=64), 1),
        (NODES, Layout(dp_replicate=4, dp_shard=128), 2),
        (NODES, Layout(dp_shard=512), 3),
    ],
)
def test_burdens_when_counted_are_what_goes_beyond_replicas(cluster: Cluster, layout: Layout, count: int) -> None:
    assert burdens(layout, cluster) == count


def test_worth_when_a_layout_has_two_burdens_is_less_by_as_many_shares(shape_of: ShapeOf) -> None:
    predictor = Predictor(shape_of("Llama-3-8B"), FULL, NODE, Wishes())
    form = Form(Layout(dp_shard=4, tp=2), "none", 4096)
    assert worth(predictor, form) == pytest.approx(speed(predictor, form) * (1 - WORTH_AN_AXIS) ** 2)


def test_forms_when_ranked_put_replicas_before_shards_that_are_hardly_faster(shape_of: ShapeOf) -> None:
    cluster = build_cluster("h100", 8, 4)
    predictor = Predictor(shape_of("SmolLM2-135M"), FULL, cluster, Wishes())
    forms = [Form(Layout(dp_shard=32, zero=1), "none", 8192), Form(Layout(dp_replicate=32), "none", 8192)]
    assert ranked(predictor, forms)[0].layout == Layout(dp_replicate=32)


def test_experts_when_sizes_are_alike_go_over_a_node() -> None:
    layouts = [Layout(dp_shard=32, ep=size) for size in (2, 4, 8, 16, 32)]
    assert min(layouts, key=simplicity).ep == 8


def _plan(shape: ModelShape, job: Job, cluster: Cluster) -> Plan:
    return search(shape, job, cluster, rescue=False)


def test_without_when_an_axis_is_needed_is_none(shape_of: ShapeOf) -> None:
    plan = _plan(shape_of("one-huge-matrix"), Job(sequence=4096, micro_batch=4096), NODE)
    assert plan.best is not None
    assert plan.without == {"tp": None}
    assert "(without it nothing fits)" in plan.best.reason


def test_without_when_an_axis_is_a_choice_is_the_best_that_lacks_it(shape_of: ShapeOf) -> None:
    plan = _plan(shape_of("Qwen3-30B-A3B"), FULL, NODE)
    assert plan.best is not None
    assert set(plan.without) == {"shards", "ep"}
    other = plan.without["ep"]
    assert other is not None
    assert other.layout.ep == 1
    ratio = other.cost.tokens_per_s / plan.best.cost.tokens_per_s
    assert f"(without it {ratio:.0%} as fast: dp_shard 8)" in plan.best.reason
