"""Whole runs in bf16 with wider masters: each way to split must run, and stay near one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tiny_models import save_tiny_model
from training_runs import losses, run

SETTINGS: dict[str, Any] = {
    "finetuning_type": "full", "learning_rate": 1e-3, "bf16": True, "global_batch_size": 4, "max_steps": 3,
    "lora_dropout": 0.0,
}  # fmt: skip
LAYOUTS: dict[str, dict[str, Any]] = {
    "fsdp2": {"strategy": "fsdp"},
    "tp2": {"strategy": "tp"},
    "pp2": {"strategy": "pp"},
    "cp2-ddp": {"parallel": {"cp": 2}},
    "cp2-fsdp": {"strategy": "fsdp", "parallel": {"cp": 2}},
    "cp2-fsdp-ulysses": {"strategy": "fsdp", "parallel": {"cp": 2, "cp_method": "ulysses"}},
    "cp2-fsdp-ring": {"strategy": "fsdp", "parallel": {"cp": 2, "cp_method": "ring"}},
}


@pytest.fixture(scope="module")
def alone(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of one process."""
    output = tmp_path_factory.mktemp("alone")
    run(model, data, output / "run", **SETTINGS)
    return losses(output / "run")


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_run_when_split_in_bf16_stays_near_one_process(
    layout: str, alone: list[float], model: Path, data: Path, tmp_path: Path
) -> None:
    run(model, data, tmp_path / "run", nproc=2, **SETTINGS, **LAYOUTS[layout])
    assert losses(tmp_path / "run") == pytest.approx(alone, abs=0.02)


def test_run_when_experts_have_wider_masters_computes_as_fsdp_does(data: Path, tmp_path: Path) -> None:
    """One process casts stacked experts by itself, FSDP gathers them in bf16."""
    model = save_tiny_model(tmp_path / "model", "qwen3_moe")
    run(model, data, tmp_path / "one", **SETTINGS)
    run(model, data, tmp_path / "two", nproc=2, strategy="fsdp", **SETTINGS)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=0.02)


@pytest.fixture(scope="module")
def alone_in_float8(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of one process that multiplies in float8."""
    output = tmp_path_factory.mktemp("float8")
    run(model, data, output / "run", **SETTINGS, fp8=True)
    return losses(output / "run")


def test_run_when_in_float8_stays_near_bf16_and_differs(alone: list[float], alone_in_float8: list[float]) -> None:
    assert alone_in_float8 == pytest.approx(alone, abs=0.05)
    assert alone_in_float8 != alone


@pytest.mark.parametrize("layout", ["fsdp2", "tp2", "pp2"])
def test_run_when_split_in_float8_stays_near_one_process(
    layout: str, alone_in_float8: list[float], model: Path, data: Path, tmp_path: Path
) -> None:
    run(model, data, tmp_path / "run", nproc=2, **SETTINGS, **LAYOUTS[layout], fp8=True)
    assert losses(tmp_path / "run") == pytest.approx(alone_in_float8, abs=0.05)
