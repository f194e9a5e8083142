"""Config lines give back exactly the layout that they were made from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fourfold.config.load import load
from fourfold.config.parallel import ParallelConfig
from fourfold.config.yaml12 import parse_yaml
from fourfold.planning.candidates import candidates
from fourfold.planning.config_lines import config_lines, config_of
from fourfold.planning.hardware import build_cluster
from fourfold.planning.job import Job
from fourfold.planning.layout import Layout, resolve_layout
from fourfold.planning.predictor import Form
from fourfold.planning.shape import ModelShape
from fourfold.planning.wishes import Wishes

LONG = Job(tuning="full", sequence=32768, micro_batch=32768, sequences_per_step=1024)


def _back(layout: Layout, wishes: Wishes | None = None) -> Layout:
    keys = parse_yaml("\n".join(config_lines(config_of(Form(layout, "none", 32768), wishes))))
    return resolve_layout(load(keys).parallel, layout.world_size)


@pytest.mark.parametrize("name", ["Llama-3-8B", "Qwen3-30B-A3B"])
@pytest.mark.parametrize(("gpus", "nodes"), [(1, 1), (8, 1), (8, 4)])
@pytest.mark.parametrize("given", [{}, {"cp_method": "ring", "pp_schedule": "gpipe", "loss_parallel": False}])
def test_lines_when_read_back_give_the_same_layout(
    name: str, gpus: int, nodes: int, given: dict[str, Any], shape_of: Callable[[str], ModelShape]
) -> None:
    wishes = Wishes(ParallelConfig(**given))
    layouts, _ = candidates(shape_of(name), LONG, build_cluster("h100", gpus, nodes), wishes)
    assert [layout for layout in layouts if _back(layout, wishes) != layout] == []


@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize("sizes", [{"dp_shard": 8}, {"dp_replicate": 2, "dp_shard": 4}, {"dp_shard": 4, "tp": 2}])
def test_lines_when_shards_keep_something_whole_say_which(zero: int, sizes: dict[str, int]) -> None:
    layout = Layout(**sizes, zero=zero)  # type: ignore[arg-type]
    assert _back(layout) == layout


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3", "fsdp", "hsdp", "tp", "pp"])
def test_strategy_when_the_user_named_one_is_kept(strategy: str) -> None:
    wishes = Wishes(ParallelConfig(strategy=strategy))  # type: ignore[arg-type]
    layout = resolve_layout(wishes.parallel, 8)
    assert config_of(Form(layout, "full", 2048), wishes)["strategy"] == strategy
    assert _back(layout, wishes) == layout


def test_lines_when_printed_are_yaml() -> None:
    keys = config_of(Form(Layout(dp_shard=4, pp=2, pp_layers=(7, 9), offload="optimizer"), "selective", 4096))
    assert config_lines(keys) == [
        "strategy: fsdp",
        "parallel:",
        "  dp_shard: 4",
        "  pp: 2",
        "  pp_schedule: 1f1b",
        "  pp_layers_per_stage: [7, 9]",
        "  offload: optimizer",
        "  recompute: selective",
        "micro_batch_tokens: 4096",
    ]
