"""Context parallelism trains as one process does: every method, on packed and on padded rows.

Samples are up to 60 tokens long, so that they span several chunks, and several windows of 16.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from harness import Case, Curve, alone, assert_same, assert_together_same, under
from test_train_layouts import run_apart

from fourfold.base.errors import PlanError
from fourfold.config.load import load
from fourfold.planning.layout import Layout
from fourfold.training.machines import choose_layout
from tiny_models import MOE_FAMILIES, save_tiny_model, tiny_config
from training_runs import losses, write_dataset

LAYOUTS = {
    "cp2": Layout(cp=2),
    "cp4": Layout(cp=4),
    "cp2-ulysses": Layout(cp=2, cp_method="ulysses"),
    "cp4-ulysses": Layout(cp=4, cp_method="ulysses"),
    "cp2-ring": Layout(cp=2, cp_method="ring"),
    "cp4-ring": Layout(cp=4, cp_method="ring"),
    "cp2-fsdp2": Layout(cp=2, dp_shard=2),
    "cp2-tp2": Layout(cp=2, tp=2),
    "cp2-tp2-ring": Layout(cp=2, tp=2, cp_method="ring"),
    "cp2-tp2-ulysses": Layout(cp=2, tp=2, cp_method="ulysses", sequence_parallel=False),
    "cp2-ddp2": Layout(cp=2, dp_replicate=2),
    "cp2-pp2": Layout(cp=2, pp=2),
    "cp2-pp2-ring": Layout(cp=2, pp=2, cp_method="ring"),
    "cp2-ep2": Layout(cp=2, ep=2),
    "cp2-hsdp2x2": Layout(cp=2, dp_replicate=2, dp_shard=2),
}
_LONG: dict[str, Any] = {"longest": 60, "max_tokens": 128}
_MILD = (("initializer_range", 0.1),)
"""Weights that magnify rounding less than the usual ones of the tests do."""
CASES = {
    "llama": Case(overrides=_MILD, **_LONG),
    "llama-lora-padded": Case(tuning="lora", packed=False, dropout=0.1, overrides=_MILD, **_LONG),
    "llama-recompute": Case(tuning="lora", recompute="selective", overrides=_MILD, **_LONG),
    "qwen3": Case("qwen3", overrides=_MILD, **_LONG),
    "gemma3": Case("gemma3_text", **_LONG),  # layers with a window of 16 and without
    "gemma2": Case("gemma2", overrides=(("initializer_range", 0.05),), **_LONG),  # capped scores
    "mistral-padded": Case("mistral", packed=False, overrides=_MILD, **_LONG),
    "mixtral-router": Case("mixtral", router=0.1, overrides=_MILD, **_LONG),
    "gpt-oss-sinks": Case("gpt_oss", overrides=_MILD, **_LONG),
}
COVER = [
    ("cp2", "llama"),
    ("cp2", "mixtral-router"),
    ("cp4", "gemma3"),
    ("cp2-ulysses", "gpt-oss-sinks"),
    ("cp4-ulysses", "mistral-padded"),
    ("cp2-ring", "gpt-oss-sinks"),
    ("cp4-ring", "gemma3"),
    ("cp2-fsdp2", "qwen3"),
    ("cp2-tp2", "llama"),
    ("cp2-tp2-ring", "llama-recompute"),
    ("cp2-pp2-ring", "llama"),
    ("cp2-ddp2", "llama-lora-padded"),
]
"""What `make test` runs; the rest of the product is the grid's."""


def _cells() -> list[Any]:
    cells = [
        (layout, case)
        for layout in LAYOUTS
        for case in CASES
        if (LAYOUTS[layout].ep == 1 or CASES[case].family in MOE_FAMILIES)
        # the router's loss is one of a micro-batch, and data-parallel ranks have others
        and (LAYOUTS[layout].dp == 1 or not CASES[case].router)
    ]
    return [pytest.param(*cell, marks=() if cell in COVER else pytest.mark.grid) for cell in cells]


@pytest.fixture(scope="module")
def reference() -> Any:
    """The curve of a case in one process, trained once."""
    curves: dict[str, Curve] = {}

    def of(name: str) -> Curve:
        if name not in curves:
            curves[name] = alone(CASES[name])
        return curves[name]

    return of


@pytest.mark.parametrize(("layout", "case"), _cells())
def test_training_when_positions_are_shared_equals_one_process(layout: str, case: str, reference: Any) -> None:
    loss = 5e-5 if CASES[case].family in MOE_FAMILIES else 1e-5
    curves = under(CASES[case], LAYOUTS[layout])
    if LAYOUTS[layout].pp > 1:
        assert_together_same(curves, reference(case), loss=loss)
    for curve in curves if LAYOUTS[layout].pp == 1 else ():
        assert_same(curve, reference(case), loss=loss)


def test_run_when_positions_are_shared_logs_the_losses_of_one_process_and_resumes_there(tmp_path: Path) -> None:
    """The path of the command: LoRA with keyed dropout, evaluation, ranks without a sample at the end of an epoch."""
    model = save_tiny_model(tmp_path / "model", "qwen3")
    write_dataset(tmp_path / "data")
    settings = {"global_batch_size": 4, "max_steps": 7, "val_size": 4, "eval_strategy": "steps", "eval_steps": 3}
    settings |= {"lora_dropout": 0.1}
    layouts = {
        "one": {},
        "cp2": {"nproc": 2, "strategy": "fsdp", "parallel": {"cp": 2}, "save_sharded": True},
        "cp2-fsdp2": {"nproc": 4, "strategy": "fsdp", "parallel": {"cp": 2, "cp_method": "ulysses"}},
    }
    for name, layout in layouts.items():
        run_apart(model, tmp_path / "data", tmp_path / name, **settings, **layout)
    for later in ("checkpoint-6", "checkpoint-7"):
        shutil.rmtree(tmp_path / "cp2" / later)
    shutil.copytree(tmp_path / "cp2", tmp_path / "resumed")
    run_apart(model, tmp_path / "data", tmp_path / "resumed", resume_from_checkpoint=True, **settings)
    for name in ("cp2", "cp2-fsdp2", "resumed"):
        for key in ("loss", "eval_loss"):
            assert losses(tmp_path / name, key) == pytest.approx(losses(tmp_path / "one", key), abs=1e-5)


@pytest.mark.parametrize(
    ("family", "overrides", "settings", "message"),
    [
        (
            "llama",
            {},
            {"cp_method": "ulysses", "cp": 3},
            "3 ranks cannot share 4 attention heads.*cp: 2 or 4, or cp_method",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            {"cp": 3},
            "rope_type dynamic or longrope",
        ),
    ],
)
def test_layout_when_positions_cannot_be_shared_says_why(
    family: str, overrides: dict[str, Any], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    tiny_config(family, **overrides).save_pretrained(tmp_path)
    cfg = {"model_name_or_path": str(tmp_path), "stage": "pt", "dataset": "x", "output_dir": "x", "parallel": settings}
    with pytest.raises(PlanError, match=message):
        choose_layout(load({**cfg, "do_train": True}, verb="train"), 3)
