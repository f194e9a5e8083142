"""Every tracker of the folder keeps the contract of `trackers/interface.py`."""

import importlib.util
import os
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fourfold.base import registry
from fourfold.base.errors import ConfigError
from fourfold.trackers import tensorboard, wandb
from fourfold.trackers.interface import RunInfo
from training_runs import run

NAMES = registry.names("fourfold.trackers")
CONFIG = {
    "learning_rate": 1e-4,
    "dataset": ("identity", "alpaca"),
    "output_dir": Path("out"),
    "hf_hub_token": "hf_private",
    "run_name": None,
}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("SWANLAB_MODE", "offline")


def module_of(name: str) -> ModuleType:
    return registry.load("fourfold.trackers", name, key="report_to")


def info_of(folder: Path, start_step: int = 0) -> RunInfo:
    return RunInfo(folder, "a run", max_steps=4, start_step=start_step, config=CONFIG)


@pytest.mark.parametrize("name", NAMES)
def test_tracker_takes_figures_and_finishes(name: str, tmp_path: Path):
    module = module_of(name)
    if importlib.util.find_spec(module.PACKAGE) is None:
        pytest.skip(f"{module.PACKAGE} is not installed")
    tracker = module.build(info_of(tmp_path))
    for step in (1, 2):
        tracker.advance(step)
        tracker.log(step, {"loss": 1.0 / step, "learning_rate": 1e-5, "epoch": 0.5})
    tracker.log(2, {"eval_loss": 0.5, "eval_runtime": 1.0})
    tracker.finish()
    tracker.finish()
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(b"hf_private" in path.read_bytes() for path in written)


@pytest.mark.parametrize("name", [name for name in NAMES if importlib.util.find_spec(module_of(name).PACKAGE) is None])
def test_tracker_without_its_package_says_what_to_install(name: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=rf"report_to: {name} .* `pip install {name}`"):
        module_of(name).build(info_of(tmp_path))


def test_tensorboard_after_resume_has_each_step_once_under_hugging_faces_names(tmp_path: Path):
    first = tensorboard.build(info_of(tmp_path))
    for step in (1, 2, 3):
        first.log(step, {"loss": float(step)})
    first.finish()
    resumed = tensorboard.build(info_of(tmp_path, start_step=2))
    for step in (3, 4):
        resumed.log(step, {"loss": 10.0 * step, "eval_loss": 1.0})
    resumed.finish()
    events = EventAccumulator(str(tmp_path / "runs"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "eval/loss"}
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1), (2, 2), (3, 30), (4, 40)]


def test_wandb_after_resume_goes_on_with_the_same_run(tmp_path: Path):
    for start_step in (0, 2):
        tracker = wandb.build(info_of(tmp_path, start_step))
        tracker.log(start_step + 1, {"loss": 1.0})
        tracker.finish()
    # offline-run-<time>-<id>, with a number after it if two began in one second
    ids = {path.name.split("-")[3] for path in (tmp_path / "wandb").glob("offline-run-*")}
    assert ids == {(tmp_path / "wandb_run_id.txt").read_text()}


def test_wandb_without_login_says_how_to_go_on(tmp_path: Path):
    # in a process of its own: the service that wandb starts keeps the mode of the first run
    code = f"""
from pathlib import Path
from fourfold.trackers import wandb
from fourfold.trackers.interface import RunInfo
wandb.build(RunInfo(Path({str(tmp_path)!r}), "a run", max_steps=4))
"""
    environment = {**os.environ, "WANDB_MODE": "online", "WANDB_API_KEY": "too-short", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "ConfigError: report_to: wandb does not start: " in done.stderr
    assert "set WANDB_MODE=offline" in done.stderr


def test_swanlab_when_a_run_has_its_key_logs_in_and_writes_it_nowhere(
    tiny_llama: Path,
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []
    package = ModuleType("swanlab")
    package.__spec__ = ModuleSpec("swanlab", None)
    for name in ("login", "init", "finish"):
        setattr(package, name, lambda *_, called=name, **options: calls.append((called, options)))
    package.log = lambda figures, step: calls.append(("log", figures))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "swanlab", package)
    keys = {"report_to": "swanlab", "swanlab_api_key": "sw_private", "swanlab_project": "p", "max_steps": 1}
    run(tiny_llama, tiny_data, tmp_path / "out", **keys)
    assert calls[0] == ("login", {"api_key": "sw_private"})
    assert [name for name, _ in calls[1:3]] == ["init", "log"]
    assert calls[1][1]["project"] == "p"
    assert "sw_private" not in str(calls[1:])
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(written) > 5
    assert not any(b"sw_private" in path.read_bytes() for path in written)
    output = capfd.readouterr()
    assert "sw_private" not in output.out + output.err
