"""Which layouts are looked at, and what is ruled out before anything is predicted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fourfold.base.errors import PlanError
from fourfold.config.parallel import ParallelConfig
from fourfold.planning.axes import check_layout
from fourfold.planning.candidates import candidates, facts_of, name_of, simplicity
from fourfold.planning.hardware import Cluster, build_cluster
from fourfold.planning.job import Job
from fourfold.planning.layout import Layout, resolve_layout
from fourfold.planning.shape import ModelShape
from fourfold.planning.wishes import Wishes

ShapeOf = Callable[[str], ModelShape]

JOB = Job(tuning="full", sequence=4096, micro_batch=8192, sequences_per_step=1024)
LONG = Job(tuning="full", sequence=32768, micro_batch=32768, sequences_per_step=1024)


def _found(shape: ModelShape, cluster: Cluster, job: Job = JOB, **parallel: Any) -> tuple[Layout, ...]:
    return candidates(shape, job, cluster, Wishes(ParallelConfig(**parallel)))[0]


def test_candidates_when_there_is_one_gpu_are_one_process(shape_of: ShapeOf) -> None:
    assert candidates(shape_of("Qwen3-30B-A3B"), LONG, build_cluster("h100"), Wishes()) == ((Layout(),), ())


@pytest.mark.parametrize("name", ["SmolLM2-135M", "Llama-3-8B", "DeepSeek-V3", "gpt-oss-20b"])
@pytest.mark.parametrize(("gpus", "nodes"), [(6, 1), (8, 1), (8, 16)])
@pytest.mark.parametrize("job", [JOB, LONG])
def test_candidates_when_listed_keep_every_rule(name: str, gpus: int, nodes: int, job: Job, shape_of: ShapeOf) -> None:
    shape, cluster = shape_of(name), build_cluster("h100", gpus, nodes)
    found = _found(shape, cluster, job)
    assert len(set(found)) == len(found) > 1
    assert list(found) == sorted(found, key=simplicity)
    for layout in found:
        assert layout.world_size == cluster.world_size
        assert check_layout(layout, facts_of(shape)) == []
        assert cluster.is_local(layout.tp)
        assert layout.cp == 1 or job is LONG
        assert layout.dp <= job.sequences_per_step


def test_candidates_when_the_model_is_a_mixture_of_experts_share_them(shape_of: ShapeOf) -> None:
    assert {layout.ep for layout in _found(shape_of("Mixtral-8x7B"), build_cluster("h100", 8))} == {1, 2, 4, 8}
    assert {layout.ep for layout in _found(shape_of("Llama-3-8B"), build_cluster("h100", 8))} == {1}


def test_candidates_when_heads_do_not_divide_say_so(shape_of: ShapeOf) -> None:
    found, rejected = candidates(shape_of("SmolLM2-135M"), JOB, build_cluster("h100", 8), Wishes())
    assert {layout.tp for layout in found} == {1}
    assert [entry.reason for entry in rejected if entry.what == "tp 2, 4, 8"] == [
        "do not divide 9 heads, 3 key heads and an MLP of 1536"
    ]


def test_candidates_when_sequences_are_few_leave_no_rank_without_one(shape_of: ShapeOf) -> None:
    few = Job(tuning="full", sequence=4096, micro_batch=4096, sequences_per_step=4)
    found, rejected = candidates(shape_of("Llama-3-8B"), few, build_cluster("h100", 8), Wishes())
    assert max(layout.dp for layout in found) == 4
    assert any("data-parallel ranks" in entry.what for entry in rejected)


@pytest.mark.parametrize(
    "given", [{"tp": 2}, {"pp": 4, "pp_schedule": "gpipe"}, {"dp_replicate": 2}, {"dp_shard": 4}, {"cp": 2}]
)
def test_candidates_when_sizes_are_given_have_them(given: dict[str, Any], shape_of: ShapeOf) -> None:
    found = _found(shape_of("Llama-3-8B"), build_cluster("h100", 8), **given)
    assert found
    assert all(getattr(layout, name) == value for layout in found for name, value in given.items())


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3", "fsdp", "hsdp", "tp", "pp"])
def test_candidates_when_a_strategy_is_named_are_its_layout(strategy: str, shape_of: ShapeOf) -> None:
    config = ParallelConfig(strategy=strategy)  # type: ignore[arg-type]
    found = _found(shape_of("Llama-3-8B"), build_cluster("h100", 8), strategy=strategy)
    assert found == (resolve_layout(config, 8),)


@pytest.mark.parametrize(
    ("given", "gpus", "what"),
    [
        ({"tp": 4}, 6, "parallel: tp 4 make 4 ranks, which do not divide 6 GPUs"),
        ({"tp": 3}, 6, "parallel.tp: 3 does not divide num_attention_heads (32)"),
        ({"ep": 2}, 8, "parallel.ep: 2 cannot be used: the model is dense"),
        ({"strategy": "single"}, 8, "strategy: takes one process"),
        ({"strategy": "fsdp", "tp": 3}, 8, "parallel: tp 3 make 3 ranks"),
        ({"dp_replicate": 2, "dp_shard": 2, "cp": 1, "tp": 1, "pp": 1}, 8, "make 4 ranks"),
    ],
)
def test_candidates_when_sizes_cannot_work_are_refused(
    given: dict[str, Any], gpus: int, what: str, shape_of: ShapeOf
) -> None:
    with pytest.raises(PlanError) as caught:
        _found(shape_of("Llama-3-8B"), build_cluster("h100", gpus), **given)
    assert what in str(caught.value)


def test_candidates_when_the_optimizer_needs_whole_state_do_not_shard(shape_of: ShapeOf) -> None:
    job = Job(tuning="full", optim="adamw_8bit", sequence=4096, micro_batch=4096, sequences_per_step=64)
    assert {layout.shards * layout.tp for layout in _found(shape_of("Llama-3-8B"), build_cluster("h100", 8), job)} == {
        1
    }


def test_candidates_when_weights_are_offloaded_shard_without_stages(shape_of: ShapeOf) -> None:
    found = _found(shape_of("Llama-3-8B"), build_cluster("h100", 8), offload="params")
    assert found
    assert all(layout.shards > 1 and layout.pp == 1 and layout.offload == "params" for layout in found)


def test_name_when_sizes_do_not_tell_all_says_the_rest() -> None:
    assert name_of(Layout(pp=2, tp=2, pp_schedule="interleaved_1f1b")) == "tp 2 x pp 2, interleaved"
    assert name_of(Layout(dp_replicate=2, cp=2, cp_shards=True)) == "dp_replicate 2 x cp 2, sharded over cp"
    assert name_of(Layout(dp_shard=8, zero=1, offload="optimizer")) == "dp_shard 8, zero 1, offload optimizer"
