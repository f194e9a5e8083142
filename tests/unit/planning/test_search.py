"""Layouts that fit are found and ranked, and what would fit where none does."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from fourfold.base.errors import PlanError
from fourfold.config.parallel import ParallelConfig
from fourfold.planning.cost import estimate_cost
from fourfold.planning.fit import least_state_bytes
from fourfold.planning.hardware import Cluster, build_cluster
from fourfold.planning.job import Job
from fourfold.planning.layout import Layout
from fourfold.planning.memory import estimate_memory
from fourfold.planning.predictor import Form, Predictor
from fourfold.planning.ranking import TIE, worth
from fourfold.planning.search import MARGIN, Plan, search
from fourfold.planning.shape import ModelShape
from fourfold.planning.wishes import Wishes

ShapeOf = Callable[[str], ModelShape]

FULL = Job(tuning="full", sequence=4096, micro_batch=8192, sequences_per_step=1024)
LORA = Job(tuning="lora", sequence=4096, micro_batch=8192, sequences_per_step=64)


def _limit(cluster: Cluster) -> float:
    return cluster.device.memory_bytes * (1 - MARGIN)


@pytest.mark.parametrize(
    ("name", "job", "gpus", "nodes"),
    [
        ("SmolLM2-135M", FULL, 1, 1),
        ("Llama-3-8B", FULL, 8, 1),
        ("Llama-3-8B", LORA, 1, 1),
        ("Llama-3-70B", FULL, 8, 4),
        ("Qwen3-30B-A3B", FULL, 8, 4),
    ],
)
def test_layouts_when_ranked_fit_and_are_predicted_alike(
    name: str, job: Job, gpus: int, nodes: int, shape_of: ShapeOf
) -> None:
    shape, cluster = shape_of(name), build_cluster("h100", gpus, nodes)
    plan = search(shape, job, cluster)
    assert plan.best is plan.layouts[0]
    for found in plan.layouts:
        asked = (found.layout, found.recompute, found.micro_batch)
        own = found.keeps.job(job)
        assert found.memory == estimate_memory(shape, own, *asked, device=cluster.device)
        assert found.cost == estimate_cost(shape, own, found.layout, cluster, found.recompute, found.micro_batch)
        assert found.memory.device <= _limit(cluster)
        assert "\n" not in found.reason
    assert len({(f.layout, f.recompute, f.micro_batch) for f in plan.layouts}) == len(plan.layouts)
    predictor = Predictor(shape, job, cluster, Wishes())
    worths = [
        worth(predictor, Form(found.layout, found.recompute, found.micro_batch, keeps=found.keeps))
        for found in plan.layouts
    ]
    assert all(later <= earlier * (1 + TIE) for i, earlier in enumerate(worths) for later in worths[i + 1 :])


def test_plan_when_made_twice_is_the_same(shape_of: ShapeOf) -> None:
    cluster = build_cluster("h100", 8, 2)
    first, second = (search(shape_of("Qwen3-30B-A3B"), FULL, cluster) for _ in range(2))
    assert (first.layouts, first.rejected) == (second.layouts, second.rejected)


def test_best_when_the_whole_fits_is_one_of_replicas(shape_of: ShapeOf) -> None:
    plan = search(shape_of("SmolLM2-135M"), FULL, build_cluster("h100", 8))
    assert plan.best is not None
    assert plan.best.layout == Layout(dp_replicate=8)


def test_best_when_the_whole_does_not_fit_shards(shape_of: ShapeOf) -> None:
    plan = search(shape_of("Llama-3-8B"), FULL, build_cluster("h100", 8))
    assert plan.best is not None
    assert plan.best.layout.shards == 8
    assert not any(found.layout.dp_replicate == 8 for found in plan.layouts)


@pytest.mark.parametrize("name", ["Llama-3.1-405B", "DeepSeek-V3"])
@pytest.mark.parametrize("sequence", [4096, 32768])
def test_search_when_over_a_thousand_gpus_takes_seconds(name: str, sequence: int, shape_of: ShapeOf) -> None:
    shape, job = shape_of(name), replace(FULL, sequence=sequence, micro_batch=sequence, sequences_per_step=2048)
    begin = time.process_time()
    plan = search(shape, job, build_cluster("h100", 8, 128))
    assert time.process_time() - begin < 5
    assert plan.layouts


@pytest.mark.parametrize(
    "layout",
    [
        Layout(),
        Layout(dp_shard=8),
        Layout(dp_replicate=8),
        Layout(dp_shard=2, tp=4),
        Layout(dp_shard=4, pp=2),
        Layout(dp_shard=8, offload="optimizer"),
        Layout(dp_shard=8, offload="params"),
    ],
)
@pytest.mark.parametrize("job", [FULL, LORA, replace(LORA, bits=4), replace(FULL, optim="sgd")])
@pytest.mark.parametrize("name", ["Llama-3-8B", "Qwen3-30B-A3B"])
def test_bound_when_compared_is_below_every_prediction(name: str, job: Job, layout: Layout, shape_of: ShapeOf) -> None:
    shape = shape_of(name)
    assert least_state_bytes(shape, job, layout) <= estimate_memory(shape, job, layout, "full", 4096).device


def test_forms_when_the_job_allows_three_sequences_go_down_to_one(shape_of: ShapeOf) -> None:
    job = Job(sequence=1000, micro_batch=3000, sequences_per_step=8)
    predictor = Predictor(shape_of("Llama-3-8B"), job, build_cluster("h100", 8), Wishes())
    assert predictor.micro_batches(Layout()) == [3000, 2000, 1000]
    assert predictor.micro_batches(Layout(dp_shard=8)) == [1000]
    assert predictor.leanest(Layout()) == Form(Layout(), "full", 1000)


def test_recompute_when_fixed_is_kept(shape_of: ShapeOf) -> None:
    plan = search(shape_of("Llama-3-8B"), LORA, build_cluster("h100"), Wishes(recomputes=("selective",)))
    assert {found.recompute for found in plan.layouts} == {"selective"}


def test_strategy_when_named_is_the_only_one(shape_of: ShapeOf) -> None:
    wishes = Wishes(ParallelConfig(strategy="zero2"))
    plan = search(shape_of("Llama-3-8B"), FULL, build_cluster("h100", 8), wishes)
    assert {found.layout for found in plan.layouts} == {Layout(dp_shard=8, zero=2)}


def test_dtype_when_the_card_lacks_it_is_refused(shape_of: ShapeOf) -> None:
    with pytest.raises(PlanError, match="has no bf16"):
        search(shape_of("SmolLM2-135M"), FULL, build_cluster("t4"))


def _holds(shape: ModelShape, job: Job, cluster: Cluster, wishes: Wishes, plan: Plan, change: str) -> Any:
    (rescue,) = [rescue for rescue in plan.rescues if rescue.change.startswith(change)]
    asked = (rescue.form.layout, rescue.form.recompute, rescue.form.micro_batch)
    memory = estimate_memory(shape, wishes.job_of(job, rescue.form.layout), *asked, device=cluster.device)
    assert memory.device == rescue.device_bytes <= _limit(cluster)
    return rescue


def test_rescues_when_nothing_fits_are_predicted_to_fit(shape_of: ShapeOf) -> None:
    shape, cluster, wishes = shape_of("Llama-3-8B"), build_cluster("h100"), Wishes()
    plan = search(shape, FULL, cluster)
    assert plan.layouts == ()
    _holds(shape, replace(FULL, master="bf16"), cluster, wishes, plan, "pure_bf16")
    lora = _holds(shape, replace(FULL, tuning="lora"), cluster, wishes, plan, "finetuning_type: lora")
    assert lora.config == {"finetuning_type": "lora"}
    more = _holds(shape, FULL, build_cluster("h100", 2), wishes, plan, "1 more GPU")
    assert more.form.layout.world_size == 2


def test_rescues_when_a_long_cutoff_is_what_does_not_fit_shorten_it(shape_of: ShapeOf) -> None:
    shape, cluster = shape_of("Llama-3-8B"), build_cluster("rtx4090")
    job = replace(LORA, bits=4, sequence=131072, micro_batch=131072)
    plan = search(shape, job, cluster)
    assert plan.layouts == ()
    (rescue,) = [rescue for rescue in plan.rescues if "cutoff_len" in rescue.config]
    length = rescue.config["cutoff_len"]
    fits = search(shape, replace(job, sequence=length, micro_batch=length), cluster)
    twice = search(shape, replace(job, sequence=2 * length, micro_batch=2 * length), cluster)
    assert fits.layouts
    room = (1 - MARGIN) * cluster.device.memory_bytes
    assert all(found.memory.device > room for found in twice.layouts)  # at most what leaves nothing free


def test_rescues_when_the_config_fixes_too_much_set_it_free(shape_of: ShapeOf) -> None:
    wishes = Wishes(ParallelConfig(strategy="ddp"), recomputes=("none",))
    plan = search(shape_of("Llama-3-8B"), FULL, build_cluster("h100", 8), wishes)
    assert any(rescue.config == {"strategy": "auto"} for rescue in plan.rescues)
    tight = replace(LORA, sequence=65536, micro_batch=65536)
    plan = search(shape_of("Llama-3-8B"), tight, build_cluster("h100"), Wishes(recomputes=("none",)))
    assert any(rescue.config == {"parallel": {"recompute": "full"}} for rescue in plan.rescues)
