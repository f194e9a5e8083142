"""What a config fixes, and what rules an axis out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from fourfold.config.load import load
from fourfold.planning.job import Job
from fourfold.planning.layout import Layout
from fourfold.planning.shape import ModelShape
from fourfold.planning.wishes import Wishes, obstacles


def _wishes(**keys: Any) -> Wishes:
    return Wishes.of(load(keys))


@pytest.mark.parametrize(
    ("keys", "kinds"),
    [
        ({}, ("none", "selective", "full")),
        ({"parallel": {"recompute": "selective"}}, ("selective",)),
        ({"gradient_checkpointing": True}, ("full",)),
        ({"gradient_checkpointing": False}, ("none",)),
        ({"parallel": {"offload_activations": True}}, ("full",)),
    ],
)
def test_recomputes_when_asked_are_as_the_engine_takes_them(keys: dict[str, Any], kinds: tuple[str, ...]) -> None:
    assert _wishes(**keys).recomputes == kinds


def test_job_when_the_batch_is_of_a_rank_grows_with_the_ranks() -> None:
    wishes = _wishes(per_device_train_batch_size=2, gradient_accumulation_steps=3)
    assert wishes.job_of(Job(sequences_per_step=6), Layout(dp_replicate=2, dp_shard=2, tp=4)).sequences_per_step == 24
    fixed = _wishes(global_batch_size=10)
    assert fixed.job_of(Job(sequences_per_step=10), Layout(dp_replicate=4)).sequences_per_step == 10


def test_obstacles_when_nothing_is_asked_are_the_missing_experts(shape_of: Callable[[str], ModelShape]) -> None:
    assert set(obstacles(shape_of("Llama-3-8B"), Job(), Wishes())) == {"ep"}
    assert obstacles(shape_of("Qwen3-30B-A3B"), Job(), Wishes()) == {}


@pytest.mark.parametrize(
    ("job", "keys", "axes"),
    [
        (Job(optim="adamw_8bit"), {}, {"tp", "dp_shard", "ep"}),
        (Job(optim="muon"), {}, {"tp", "ep"}),
        (Job(tuning="freeze"), {}, {"pp", "ep"}),
        (Job(), {"use_dora": True}, {"tp", "ep"}),
        (Job(), {"pissa_init": True}, {"tp", "dp_shard", "pp", "ep"}),
        (Job(), {"stage": "dpo"}, {"ep"}),
    ],
)
def test_obstacles_when_keys_need_whole_things_are_named(
    job: Job, keys: dict[str, Any], axes: set[str], shape_of: Callable[[str], ModelShape]
) -> None:
    assert set(obstacles(shape_of("Llama-3-8B"), job, _wishes(**keys))) == axes


def test_given_when_a_key_is_in_the_config_is_known() -> None:
    assert _wishes(parallel={"pp_schedule": "1f1b"}).is_given("pp_schedule")
    assert not _wishes().is_given("pp_schedule")


def test_obstacles_when_the_model_refuses_an_axis_name_it(shape_of: Callable[[str], ModelShape]) -> None:
    shape = replace(shape_of("Llama-3-8B"), refused=(("cp", "it turns"), ("pp", "it has no plan")))
    found = obstacles(shape, Job(), Wishes())
    assert (found["cp"], found["pp"]) == ("it turns", "it has no plan")
    assert "rope_type dynamic" in _wishes(rope_scaling="dynamic").ruled_out["cp"]
