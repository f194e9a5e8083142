"""Stage kd with teachers of other shapes and in whole runs over several processes; what of a teacher stays gathered."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from case_teacher import make_teacher
from cells import LAYOUTS
from harness import Case, alone, make_steps, run_ranks, under
from test_train_layouts import run_apart
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from fourfold.base.errors import PlanError
from fourfold.config.load import load
from fourfold.dataset.collate import CutPolicy, cut
from fourfold.losses.teacher import KdSettings
from fourfold.models.targets import decoder_blocks
from fourfold.parallel.mesh import build_mesh
from fourfold.planning.layout import Layout
from fourfold.training.machines import choose
from tiny_models import VOCAB_SIZE, save_tiny_model
from training_runs import config, losses

_JSD = KdSettings("jsd", beta=0.3, temperature=1.5, alpha=0.6)
_CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("layout", "family", "teacher", "rows"),
    [
        ("tp2", "llama", "qwen3", -12),
        ("fsdp2xtp2", "qwen3", "llama", 40),
        ("ep2", "qwen3_moe", "llama", 0),
        ("zero3-2", "llama", "qwen3_moe", 16),
        ("pp2-gpipe", "llama", "gemma3_text", 16),
        *(
            pytest.param(name, "llama", "qwen3", -12, marks=pytest.mark.grid)
            for name in ("zero1-2", "zero2-2", "hsdp2x2", "tp2-whole-positions", "pp2-interleaved_1f1b", "pp2-zbv")
        ),
        *(
            pytest.param(name, "qwen3", "llama", 16, marks=pytest.mark.grid)
            for name in ("tp2-whole-logits", "cp2-ulysses", "cp2-ring", "cp2xfsdp2", "tp2xpp2", "fsdp2xtp2xpp2")
        ),
        pytest.param("ep2xpp2", "qwen3_moe", "llama", 0, marks=pytest.mark.grid),
        pytest.param("fsdp2xep2", "qwen3_moe", "qwen3_moe", 0, marks=pytest.mark.grid),
    ],
)
def test_kd_when_the_teacher_has_another_shape_gives_the_losses_of_one_process(
    layout: str, family: str, teacher: str, rows: int
) -> None:
    stages = LAYOUTS[layout].pp * (2 if LAYOUTS[layout].pp_schedule in ("interleaved_1f1b", "zbv") else 1)
    overrides = (("num_attention_heads", 8), ("num_key_value_heads", 2), ("num_hidden_layers", max(stages, 2)))
    case = Case(
        family=family,
        stage="kd",
        kd=_JSD,
        teacher_family=teacher,
        teacher_rows=rows,
        overrides=overrides,
        steps=(0, 1, 4),
    )
    expected = alone(case)
    for curve in under(case, LAYOUTS[layout]):
        # experts' chosen tokens are summed in another order, and their weights are drawn wide
        assert curve.losses == pytest.approx(expected.losses, abs=5e-5 if "moe" in family + teacher else 1e-5)
        assert curve.metrics == pytest.approx(expected.metrics, abs=1e-4, rel=1e-5)


def _gathered(layout: Layout) -> tuple[list[bool], bool]:
    """After the teacher was asked: for each of its layers whether it is gathered, and whether the head is."""
    mesh = build_mesh(layout, _CPU)
    case = Case(stage="kd", teacher_family="llama")
    teacher = make_teacher(case, mesh, VOCAB_SIZE)
    found = teacher.states(cut(make_steps(VOCAB_SIZE)[0], CutPolicy(packed=True, max_tokens=64)))
    root = teacher.step.module
    assert isinstance(root, PreTrainedModel)
    assert found.head is not None
    assert not any(states.requires_grad for states in found.hidden)
    layers = [_is_gathered(layer) for layer in decoder_blocks(root)[1]]
    head = root.get_output_embeddings()
    assert head is not None
    return layers, _is_gathered(head)


def _is_gathered(module: nn.Module) -> bool:
    return not any(isinstance(parameter, DTensor) for parameter in module.parameters())


@pytest.mark.parametrize("zero", [1, 3])
def test_teacher_when_asked_leaves_its_layers_sharded_and_the_head_gathered(zero: int) -> None:
    for layers, head in run_ranks(2, partial(_gathered, Layout(dp_shard=2, zero=zero))):
        assert layers == [False] * len(layers)
        assert head


_WHOLE: dict[str, dict[str, Any]] = {
    "one": {},
    "ddp2": {"nproc": 2, "strategy": "ddp"},
    "fsdp2": {"nproc": 2, "strategy": "fsdp"},
    "tp2": {"nproc": 2, "strategy": "tp"},
    "pp2": {"nproc": 2, "strategy": "pp", "parallel": {"pp_layers_per_stage": [1, 3]}},
}


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of four layers."""
    return save_tiny_model(tmp_path_factory.mktemp("student") / "llama", num_hidden_layers=4)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wider one of five, with rows that pad its vocabulary."""
    folder = tmp_path_factory.mktemp("teacher") / "qwen3"
    sizes = {"hidden_size": 64, "num_hidden_layers": 5, "vocab_size": VOCAB_SIZE + 16}
    return save_tiny_model(folder, "qwen3", seed=3, **sizes)


@pytest.fixture(scope="module")
def finished(student: Path, teacher: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A whole run under each layout, with checkpoints at steps 2 and 4."""
    root = tmp_path_factory.mktemp("runs")
    for name, keys in _WHOLE.items():
        run_apart(student, data, root / name, **_settings(teacher), **keys)
    return {name: root / name for name in _WHOLE}


def _settings(teacher: Path) -> dict[str, Any]:
    return {
        "stage": "kd",
        "teacher_model": str(teacher),
        "kd_loss": "jsd",
        "global_batch_size": 4,
        "max_steps": 4,
        "save_steps": 2,
        "val_size": 3,
        "eval_strategy": "steps",
        "eval_steps": 2,
    }


@pytest.mark.parametrize("layout", sorted(set(_WHOLE) - {"one"}))
def test_run_of_kd_when_split_logs_the_losses_of_one_process(layout: str, finished: dict[str, Path]) -> None:
    for figure in ("loss", "kd_loss", "eval_loss", "eval_kd_loss"):
        assert losses(finished[layout], figure) == pytest.approx(losses(finished["one"], figure), abs=1e-5)


@pytest.mark.parametrize(("before", "after"), [("tp2", "one"), ("fsdp2", "pp2")])
def test_resume_of_kd_when_under_another_layout_goes_on_as_if_never_stopped(
    before: str, after: str, student: Path, teacher: Path, data: Path, finished: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished[before], folder)
    shutil.rmtree(folder / "checkpoint-4")
    run_apart(student, data, folder, resume_from_checkpoint=True, **_settings(teacher), **_WHOLE[after])
    assert losses(folder) == pytest.approx(losses(finished["one"]), abs=1e-5)


def test_run_of_kd_when_the_teacher_cannot_be_split_says_so(student: Path, data: Path, tmp_path: Path) -> None:
    odd = save_tiny_model(tmp_path / "odd", "llama", hidden_size=24, num_attention_heads=3, num_key_value_heads=3)
    run = load(config(student, data, tmp_path / "run", **_settings(odd), **_WHOLE["tp2"]), verb="train")
    with pytest.raises(PlanError, match=r"teacher_model: cannot be split so: .*tp: 2 does not divide"):
        choose(run, 2)
