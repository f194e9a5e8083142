"""The memory of a run with a teacher: held bytes by arithmetic, the peak against the engine on fake tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoConfig

from fourfold.config.load import load
from fourfold.config.second import teacher_run
from fourfold.planning.job import Job, Teacher
from fourfold.planning.layout import Layout
from fourfold.planning.memory import estimate_memory
from fourfold.planning.read_shape import read_shape
from fourfold.planning.shape import ModelShape
from fourfold.planning.teacher import teacher_memory
from fourfold.training.rehearse import Workload, rehearse
from tiny_models import SMALL_SIZES, save_tiny_model

ShapeOf = Callable[[str], ModelShape]

_SIZES = {**SMALL_SIZES, "vocab_size": 16384}
_LLAMA_8B = 8_030_261_248
"""Parameters of Llama 3 8B (arXiv:2407.21783 calls them 8B; the sum over its published tensors)."""
_TABLE = 128_256 * 4096


@pytest.mark.parametrize(
    ("layout", "held"),
    [
        (Layout(), 2 * _LLAMA_8B),
        (Layout(dp_replicate=4), 2 * _LLAMA_8B),
        (Layout(dp_shard=8), 2 * _LLAMA_8B // 8),
        (Layout(tp=2), _LLAMA_8B + 65 * 4096),  # each rank has the 65 norms whole
        (Layout(dp_shard=8, offload="params"), 0),
    ],
    ids=lambda value: value.describe().replace(" ", "") if isinstance(value, Layout) else "",
)
def test_teacher_memory_when_split_holds_its_part(layout: Layout, held: int, shape_of: ShapeOf) -> None:
    teacher = Teacher(shape_of("Llama-3-8B"))
    assert teacher_memory(teacher, Job(), layout, 0, 2048).held == held


def test_teacher_memory_when_sharded_keeps_the_head_gathered_on_the_last_stage_alone(shape_of: ShapeOf) -> None:
    teacher = Teacher(shape_of("Llama-3-8B"))
    layout = Layout(dp_shard=4, pp=2)
    first, last = (teacher_memory(teacher, Job(), layout, rank, 2048) for rank in range(2))
    assert (first.head, last.head) == (0, 2 * (_TABLE + 4096))  # in bf16, with the last norm
    alone = teacher_memory(teacher, Job(), Layout(dp_shard=4), 0, 2048)
    assert alone.head == last.head
    assert alone.asked < first.asked + last.asked == 2 * _LLAMA_8B  # a pipeline gathers all that it has


def test_estimate_memory_when_there_is_a_teacher_has_its_bytes_in_a_term(shape_of: ShapeOf) -> None:
    job = Job(tuning="full")
    taught = replace(job, teacher=Teacher(shape_of("Llama-3-8B"), bits=4))
    without, found = (
        estimate_memory(shape_of("Llama-3.2-1B"), each, Layout(), "none", 2048).terms for each in (job, taught)
    )
    assert without["teacher"] == 0
    assert 2 * _LLAMA_8B // 4 < found["teacher"] < 2 * _LLAMA_8B // 2
    alike = ("parameters", "gradients", "optimizer", "buffers")
    assert [found[name] for name in alike] == [without[name] for name in alike]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A student, and a teacher four times as wide with the same vocabulary."""
    root = tmp_path_factory.mktemp("models")
    wide = {**_SIZES, "hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "vocab_size": 16448}
    return save_tiny_model(root / "student", **_SIZES), save_tiny_model(root / "teacher", **wide)


@pytest.mark.parametrize(
    ("tuning", "layout", "rank"),
    [
        ("finetuning_type=full", Layout(), 0),
        ("finetuning_type=full", Layout(dp_shard=2), 0),
        ("finetuning_type=full", Layout(dp_shard=2, zero=2), 0),
        ("finetuning_type=lora", Layout(tp=2), 1),
        ("finetuning_type=lora", Layout(pp=2), 1),
        ("finetuning_type=lora", Layout(dp_shard=2, pp=2), 0),
        ("quantization_bit=4 teacher_model_quantization_bit=4", Layout(dp_shard=2), 0),
    ],
    ids=lambda value: value.describe().replace(" ", "") if isinstance(value, Layout) else str(value),
)
def test_estimate_memory_when_there_is_a_teacher_agrees_with_a_trace(
    tuning: str, layout: Layout, rank: int, folders: tuple[Path, Path]
) -> None:
    student, teacher = map(str, folders)
    keys = {"model_name_or_path": student, "teacher_model": teacher, "stage": "kd", "bf16": True, "cutoff_len": 4096}
    run = load(keys, tuning.split())
    asked = teacher_run(run)
    assert asked is not None
    shapes = [read_shape(AutoConfig.from_pretrained(folder)) for folder in folders]
    job = replace(
        Job.of(run),
        teacher=Teacher.of(asked, shapes[1]),
        sequence=4096,
        micro_batch=4096,
        sequences_per_step=layout.pp * layout.dp,
    )
    stage = rank // (layout.world_size // layout.pp)
    expected = estimate_memory(shapes[0], job, layout, "none", 4096, rank=stage).allocated
    found = rehearse(run, layout, Workload((4096,), layout.pp), rank=rank).peak.total
    assert expected == pytest.approx(found, rel=0.05)
