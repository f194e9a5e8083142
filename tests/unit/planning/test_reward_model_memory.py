"""Stage rm makes no logits: none are planned, and the peak is that of the engine on fake tensors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoConfig

from fourfold.config.load import load
from fourfold.models.value_head import reads_logits
from fourfold.planning.flops import head_flops
from fourfold.planning.hardware import find_device
from fourfold.planning.job import Job
from fourfold.planning.kernels import head_seconds
from fourfold.planning.layout import Layout
from fourfold.planning.memory import estimate_memory
from fourfold.planning.read_shape import read_shape
from fourfold.training.rehearse import Workload, rehearse
from tiny_models import SMALL_SIZES, save_tiny_model

_SIZES = {**SMALL_SIZES, "vocab_size": 32768}
"""A vocabulary so large that a step's peak is at the logits, where there are any."""
_TOKENS = 1024
_ONE = Layout()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "llama", **_SIZES)


def _job(model: Path, stage: str, layout: Layout = _ONE, tuning: str = "lora") -> Job:
    run = load({"model_name_or_path": str(model), "stage": stage, "finetuning_type": tuning, "bf16": True})
    return replace(Job.of(run), sequence=_TOKENS, micro_batch=_TOKENS, sequences_per_step=layout.dp * layout.pp)


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("layout", [Layout(), Layout(dp_shard=4), Layout(tp=2), Layout(pp=2)], ids=Layout.describe)
def test_logits_when_the_stage_is_rm_take_no_memory(layout: Layout, tuning: str, model: Path) -> None:
    shape = read_shape(AutoConfig.from_pretrained(model))
    sft, rm = (
        estimate_memory(shape, _job(model, stage, layout, tuning), layout, "none", _TOKENS, rank=layout.pp - 1)
        for stage in ("sft", "rm")
    )
    assert sft.terms["logits"] > 0
    assert rm.terms["logits"] == 0
    assert rm.allocated <= sft.allocated - sft.terms["logits"] // 2  # the peak is elsewhere now


@pytest.mark.parametrize("stage", ["pt", "sft", "rm", "dpo", "kto", "ppo", "grpo", "kd"])
def test_job_when_the_stage_reads_no_logits_makes_none(stage: str, model: Path) -> None:
    assert _job(model, stage).trained_share == float(reads_logits(stage))


def test_head_when_the_stage_is_rm_takes_no_time(model: Path) -> None:
    shape, job = read_shape(AutoConfig.from_pretrained(model)), _job(model, "rm")
    assert head_flops(shape, job).total == 0
    found = head_seconds(shape, job, _TOKENS, 1, find_device("h100"))
    assert (found.forward, found.backward, found.weight_grad) == (0, 0, 0)


@pytest.mark.parametrize("layout", [Layout(), Layout(dp_shard=4), Layout(tp=2), Layout(pp=2)], ids=Layout.describe)
def test_memory_when_the_stage_is_rm_is_what_the_engine_takes(layout: Layout, model: Path) -> None:
    run = load({"model_name_or_path": str(model), "stage": "rm", "bf16": True})
    shape, job = read_shape(AutoConfig.from_pretrained(model)), _job(model, "rm", layout)
    rank = layout.pp - 1
    found = rehearse(run, layout, Workload((_TOKENS,), layout.pp), rank=rank).peak.total
    assert estimate_memory(shape, job, layout, "none", _TOKENS, rank=rank).allocated == pytest.approx(found, rel=0.05)
