"""What runs the layers of a planned job is what the run will choose, and its figures are that engine's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

from fourfold.config.load import load
from fourfold.config.parallel import ParallelConfig
from fourfold.families.shared_positions import caps_scores, has_fused_scores, is_exchangeable
from fourfold.planning.config_lines import parallel_config
from fourfold.planning.engines import engine_of
from fourfold.planning.hardware import build_cluster, find_device
from fourfold.planning.job import Job
from fourfold.planning.keeps import Keeps
from fourfold.planning.layout import Layout
from fourfold.planning.report import best_config
from fourfold.planning.search import search
from fourfold.planning.shape import ModelShape
from fourfold.planning.wishes import Wishes

_FULL, _LORA = Job(tuning="full"), Job(tuning="lora")


@pytest.mark.parametrize(
    ("model", "job", "layout", "card", "engine"),
    [
        ("Llama-3-8B", _LORA, Layout(), "h100", "replayed"),
        ("Llama-3-8B", _FULL, Layout(), "h100", "compiled"),
        ("Llama-3-8B", _LORA, Layout(dp_replicate=2), "h100", "compiled"),
        ("Llama-3-8B", _FULL, Layout(dp_shard=8), "4090", "compiled"),
        ("Llama-3-8B", _FULL, Layout(dp_shard=4, tp=2), "h100", "compiled"),
        ("Llama-3-8B", _FULL, Layout(pp=2), "h100", "compiled"),
        ("Llama-3-8B", _FULL, Layout(cp=2), "h100", "compiled"),
        ("Llama-3-8B", _FULL, Layout(dp_shard=2, offload="params"), "h100", "eager"),
        ("Llama-3-8B", replace(_LORA, compute="fp32"), Layout(), "h100", "eager"),
        ("Llama-3-8B", replace(_LORA, packed=False), Layout(), "h100", "eager"),
        ("Llama-3-8B", replace(_LORA, compute="fp16"), Layout(), "v100", "eager"),
        ("Qwen3-30B-A3B", _LORA, Layout(), "h100", "compiled"),
        ("Qwen3-30B-A3B", replace(_LORA, lora_targets=("q_proj", "v_proj")), Layout(), "h100", "compiled"),
        ("Qwen3-30B-A3B", replace(_FULL, compute="fp16"), Layout(), "h100", "around"),
        ("Qwen3-30B-A3B", _FULL, Layout(dp_shard=8, ep=8), "h100", "around"),
    ],
)
def test_engine_when_a_layout_is_planned_is_the_runs_own(
    model: str, job: Job, layout: Layout, card: str, engine: str, shape_of: Callable[[str], ModelShape]
) -> None:
    assert engine_of(shape_of(model), job, layout, find_device(card), compiles=True, replays=True) == engine


@pytest.mark.parametrize(
    ("model", "layout", "engine"),
    [
        ("Llama-3-8B", Layout(tp=4), "compiled"),
        ("Llama-3-8B", Layout(dp_shard=4, tp=2), "compiled"),
        ("Llama-3-8B", Layout(dp_replicate=2, tp=2, pp=2, pp_schedule="interleaved_1f1b"), "compiled"),
        ("Llama-3-8B", Layout(pp=4, pp_schedule="zbv"), "eager"),
        ("Llama-3-8B", Layout(tp=2, cp=2), "compiled"),
        ("Qwen3-30B-A3B", Layout(tp=2), "around"),
        ("Qwen3-30B-A3B", Layout(pp=2), "compiled"),
        ("Qwen3-30B-A3B", Layout(dp_shard=2, ep=2, pp=2, pp_schedule="zbv"), "eager"),
        ("Qwen3-30B-A3B", Layout(dp_shard=2), "compiled"),
    ],
)
def test_engine_when_layers_are_split_is_compiled_but_for_zbv(
    model: str, layout: Layout, engine: str, shape_of: Callable[[str], ModelShape]
) -> None:
    arguments = (shape_of(model), _FULL, layout, find_device("h100"))
    assert engine_of(*arguments, compiles=True, replays=True) == engine
    assert engine_of(*arguments, compiles=False, replays=True) == "eager"


def test_plan_when_there_is_room_says_what_a_run_keeps(shape_of: Callable[[str], ModelShape]) -> None:
    shape, wishes = shape_of("Llama-3.2-3B"), Wishes(compiles=True)
    job = replace(_FULL, sequence=4096, micro_batch=8192, sequences_per_step=2)
    one = search(shape, job, build_cluster("h100"), wishes).best
    assert one is not None
    assert one.keeps == Keeps(logits=True, copies=True)
    assert (one.as_json()["layout"]["keeps_logits"], one.as_json()["layout"]["keeps_copies"]) == (True, True)
    assert "logits and copies of weights in 16 bits are kept" in one.reason
    full = replace(wishes, parallel=ParallelConfig(strategy="fsdp"))
    sharded = search(shape, replace(job, sequences_per_step=32), build_cluster("h100", 8), full).best
    assert sharded is not None
    assert sharded.keeps == Keeps(logits=True)
    for other, asked in ((job, Wishes()), (replace(job, host_embedding=True), wishes)):
        found = search(shape, other, build_cluster("h100"), asked).best
        assert found is not None
        assert (found.keeps.logits, found.keeps.copies) == (False, False)


def test_engine_when_attention_needs_more_than_offsets_is_eager(shape_of: Callable[[str], ModelShape]) -> None:
    dropping = replace(shape_of("Llama-3-8B"), by_offsets=False)
    assert engine_of(dropping, _FULL, Layout(), find_device("h100"), compiles=True, replays=True) == "eager"


@pytest.mark.parametrize(("card", "engine"), [("h100", "compiled"), ("a100-80g", "eager")])
def test_engine_when_scores_are_capped_is_compiled_on_cards_with_a_kernel_for_them(
    card: str, engine: str, shape_of: Callable[[str], ModelShape]
) -> None:
    capped = replace(shape_of("Llama-3-8B"), caps_scores=True)
    assert engine_of(capped, _FULL, Layout(), find_device(card), compiles=True, replays=True) == engine


@pytest.mark.parametrize(
    ("family", "changes", "told", "capped"),
    [
        ("llama", {}, True, False),
        ("qwen3", {"attention_dropout": 0.1}, False, False),
        ("gemma2", {}, True, True),
        ("gpt_oss", {}, True, False),
        ("qwen3_next", {}, False, False),
    ],
)
def test_shape_when_it_is_read_knows_whether_offsets_are_all_that_attention_needs(
    family: str, changes: dict[str, Any], told: bool, capped: bool
) -> None:
    config = AutoConfig.for_model(family)
    for name, value in changes.items():
        setattr(config, name, value)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    assert (is_exchangeable(config, model_class) and has_fused_scores(config)) == told
    assert caps_scores(config) == capped


def test_engine_when_keys_forbid_it_is_eager(shape_of: Callable[[str], ModelShape]) -> None:
    arguments = (shape_of("Llama-3-8B"), _LORA, Layout(), find_device("h100"))
    assert engine_of(*arguments, compiles=False, replays=True) == "eager"
    assert engine_of(*arguments, compiles=True, replays=False) == "compiled"


@pytest.mark.parametrize(
    ("keys", "compiles"),
    [
        ({}, True),
        ({"max_steps": 59}, False),
        ({"max_steps": 60}, True),
        ({"max_steps": 20, "torch_compile": True}, True),
        ({"max_steps": 20, "finetuning_type": "full", "fp8": True, "bf16": True}, True),
        ({"torch_compile": False}, False),
        ({"lora_dropout": 0.1, "neftune_noise_alpha": 5}, True),
        ({"use_dora": True}, False),
        ({"parallel": {"offload_activations": True}}, False),
    ],
)
def test_wishes_when_a_run_would_not_compile_its_layers_say_so(keys: dict[str, Any], compiles: bool) -> None:
    assert Wishes.of(load(keys)).compiles == compiles


@pytest.mark.parametrize(
    ("job", "gpus", "tokens_per_s"),
    [
        # benchmarks/results: lora_4k of gpu_h100.json, 8b-full-fsdp4-8k-compiled of multi_gpu_4xh100.json
        (Job(sequence=4096, micro_batch=8192, sequences_per_step=2), 1, 15_576),
        (Job(tuning="full", sequence=8192, micro_batch=8192, sequences_per_step=4), 4, 4 * 9_147),
    ],
)
def test_plan_when_layers_are_compiled_foretells_what_was_measured(
    job: Job, gpus: int, tokens_per_s: float, shape_of: Callable[[str], ModelShape]
) -> None:
    wishes = Wishes(compiles=True, replays=True)
    best = search(shape_of("Llama-3-8B"), job, build_cluster("h100", gpus), wishes).best
    assert best is not None
    assert best.engine != "eager"
    assert best.recompute == "none"
    assert best.cost.tokens_per_s == pytest.approx(tokens_per_s, rel=0.05)


def test_plan_when_layers_are_computed_again_leaves_out_those_that_there_is_room_for(
    shape_of: Callable[[str], ModelShape],
) -> None:
    job, cluster = Job(sequence=8192, micro_batch=8192, sequences_per_step=4), build_cluster("h100", 4)
    wishes = Wishes(compiles=True)
    best = search(shape_of("Llama-3-70B"), job, cluster, wishes).best
    assert best is not None
    assert (best.layout, best.recompute) == (Layout(dp_shard=4), "full")
    # 1,265 tokens/s a GPU were measured with 6 layers spared (benchmarks/results/multi_gpu_4xh100.json)
    assert 5 <= best.keeps.spared <= 8
    assert best.cost.tokens_per_s == pytest.approx(4 * 1_265, rel=0.06)
    asked = search(shape_of("Llama-3-70B"), job, cluster, replace(wishes, recomputes=("full",))).best
    assert asked is not None
    assert asked.keeps.spared == 0
    assert asked.cost.tokens_per_s < best.cost.tokens_per_s


@pytest.mark.parametrize("asked", [("selective",), ("none", "selective", "full")])
def test_recompute_when_layers_are_compiled_is_never_selective(
    asked: tuple[Any, ...], shape_of: Callable[[str], ModelShape]
) -> None:
    wishes = Wishes(compiles=True, recomputes=asked)
    plan = search(shape_of("Llama-3-8B"), replace(_FULL, sequence=8192), build_cluster("h100", 8), wishes)
    compiled = [found for found in plan.layouts if found.engine == "compiled"]
    assert compiled
    assert all(found.recompute != "selective" for found in compiled)


def test_lines_when_layers_are_compiled_leave_recompute_to_the_run(shape_of: Callable[[str], ModelShape]) -> None:
    job, cluster = Job(tuning="full", sequence=8192, micro_batch=8192, sequences_per_step=8), build_cluster("h100", 8)
    plan = search(shape_of("Llama-3-8B"), job, cluster, Wishes(compiles=True))
    config = best_config(plan)
    assert config is not None
    assert "recompute" not in config["parallel"]
    # so that a run that turns out too short to be compiled may compute again what does not fit then
    again = Wishes(parallel=parallel_config(config))
    assert search(shape_of("Llama-3-8B"), job, cluster, again).best is not None
    asked = search(shape_of("Llama-3-8B"), job, cluster, Wishes(compiles=True, recomputes=("full",)))
    config = best_config(asked)
    assert config is not None
    assert config["parallel"]["recompute"] == "full"
