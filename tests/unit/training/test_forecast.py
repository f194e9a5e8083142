"""Predicted and measured figures at the end of a run."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from fourfold.planning.hardware import build_cluster
from fourfold.training import assemble
from fourfold.training.forecast import Forecast, table
from tiny_models import save_tiny_model
from training_runs import run, write_dataset


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tiny model and a data set."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("FOURFOLD_CACHE", str(tmp_path / "cache"))
    write_dataset(tmp_path / "data")
    save_tiny_model(tmp_path / "model")
    return tmp_path


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What is logged, whatever earlier tests set up."""
    monkeypatch.setattr(logging.getLogger("fourfold"), "propagate", True)
    caplog.set_level(logging.INFO, "fourfold")
    return caplog


def test_run_when_its_gpu_is_known_ends_with_predicted_and_measured(
    folder: Path, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(assemble, "cluster_of_job", lambda run, world_size: build_cluster("h100"))
    results = run(folder / "model", folder / "data", folder / "out", max_steps=5, bf16=True)
    written = json.loads((folder / "out" / "all_results.json").read_text(encoding="utf-8"))
    assert results == json.loads((folder / "out" / "train_results.json").read_text(encoding="utf-8")) == written
    # cuBLAS's workspace of 32 MiB outweighs a model of 40,000 parameters
    assert 32 / 1024 < results["predicted_peak_memory_gib"] < 64 / 1024
    assert 0 < results["predicted_step_s"] < 1
    assert 0 < results["step_s"] <= results["train_runtime"]
    told = [line.split() for line in log.messages if line.startswith("  step, s")]
    assert told[0][2:4] == [f"{results['predicted_step_s']:.4f}", f"{results['step_s']:.4f}"]


def test_run_when_on_a_cpu_has_no_prediction(folder: Path, log: pytest.LogCaptureFixture) -> None:
    results = run(folder / "model", folder / "data", folder / "out", max_steps=2)
    assert not [name for name in results if name.startswith("predicted") or name == "step_s"]
    assert not [line for line in log.messages if "predicted" in line]


def test_run_when_the_model_is_not_known_trains_without_a_prediction(
    folder: Path, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    def unknown(*args: object, **kwargs: object) -> object:
        raise ValueError("no such model")

    monkeypatch.setattr(assemble, "cluster_of_job", lambda run, world_size: build_cluster("h100"))
    monkeypatch.setattr("fourfold.training.outlook.read_shape", unknown)
    results = run(folder / "model", folder / "data", folder / "out", max_steps=2)
    assert "train_loss" in results
    assert "predicted_step_s" not in results
    [line] = [line for line in log.messages if "not predicted" in line]
    assert line.endswith("cannot be read (no such model)")


def test_table_when_figures_differ_shows_by_how_much() -> None:
    assert table(Forecast(60.0, 66.0, 1.1), Forecast(64.0, 66.0, 1.0)) == [
        "                       predicted  measured   off by",
        "  peak allocated, GiB      60.00     64.00    -6.2%",
        "  peak reserved, GiB       66.00     66.00    +0.0%",
        "  step, s                 1.1000    1.0000   +10.0%",
    ]
