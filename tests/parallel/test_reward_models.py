"""Reward models over several processes: whole runs with the losses of one, resumed under other layouts, and scoring."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_train_layouts import LAYOUTS, run_apart

from fourfold.models.value_head import FILE
from tiny_models import save_tiny_model
from training_runs import losses

_LAYOUTS = {name: LAYOUTS[name] for name in ("one", "ddp2", "fsdp3", "tp2", "pp2", "fsdp2xtp2")}
_LAYOUTS["cp2"] = {"nproc": 2, "strategy": "ddp", "parallel": {"cp": 2}}
_SPLIT = sorted(set(_LAYOUTS) - {"one"})
_TUNINGS: dict[str, dict[str, Any]] = {
    "lora": {"learning_rate": 1e-3},
    "full": {"finetuning_type": "full", "learning_rate": 1e-4},
}
_KEYS: dict[str, Any] = {
    "stage": "rm",
    "dataset": "tiny_pairs",
    "global_batch_size": 4,
    "max_steps": 6,
    "val_size": 5,
    "do_predict": True,
    "per_device_eval_batch_size": 2,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama, whose head is not the embedding and so is left out of the training."""
    return save_tiny_model(tmp_path_factory.mktemp("model") / "llama")


def settings_of(tuning: str, layout: str) -> dict[str, Any]:
    return {**_KEYS, **_TUNINGS[tuning], **_LAYOUTS[layout]}


@pytest.fixture(scope="module")
def finished(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """A whole run under each layout, with checkpoints at steps 3 and 6, that scores at its end."""
    root, folders = tmp_path_factory.mktemp("runs"), {}
    for tuning in _TUNINGS:
        for layout in _LAYOUTS:
            folders[tuning, layout] = root / f"{tuning}-{layout}"
            sharded = {"save_sharded": True} if (tuning, layout) == ("full", "fsdp2xtp2") else {}
            run_apart(model, data, folders[tuning, layout], **settings_of(tuning, layout), **sharded)
    return folders


def scores_of(folder: Path) -> list[float]:
    lines = (folder / "generated_predictions.jsonl").read_text().splitlines()
    return [row[role] for row in map(json.loads, lines) for role in ("chosen", "rejected")]


@pytest.mark.parametrize("tuning", sorted(_TUNINGS))
@pytest.mark.parametrize("layout", _SPLIT)
def test_reward_model_when_split_learns_and_scores_as_in_one_process(
    tuning: str, layout: str, finished: dict[tuple[str, str], Path]
) -> None:
    split, one = finished[tuning, layout], finished[tuning, "one"]
    assert losses(split) == pytest.approx(losses(one), abs=1e-5)
    assert scores_of(split) == pytest.approx(scores_of(one), abs=1e-4)
    assert len(scores_of(one)) == 10
    weights = load_file(split / FILE)
    assert weights.keys() == load_file(one / FILE).keys()
    for name, tensor in load_file(one / FILE).items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("tuning", sorted(_TUNINGS))
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("one", "fsdp3"),
        ("fsdp3", "pp2"),
        ("pp2", "tp2"),
        ("tp2", "ddp2"),
        ("fsdp2xtp2", "one"),
        ("ddp2", "cp2"),
        ("cp2", "fsdp2xtp2"),
    ],
)
def test_reward_model_when_resumed_under_another_layout_goes_on_as_if_never_stopped(
    before: str,
    after: str,
    tuning: str,
    model: Path,
    data: Path,
    finished: dict[tuple[str, str], Path],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished[tuning, before], folder)
    shutil.rmtree(folder / "checkpoint-6")
    run_apart(model, data, folder, resume_from_checkpoint=True, **settings_of(tuning, after))
    assert losses(folder) == pytest.approx(losses(finished[tuning, "one"]), abs=1e-5)
    assert scores_of(folder) == pytest.approx(scores_of(finished[tuning, "one"]), abs=1e-4)


def test_checkpoint_when_sharded_has_the_value_head_beside_its_shards(
    finished: dict[tuple[str, str], Path],
) -> None:
    folder = finished["full", "fsdp2xtp2"] / "checkpoint-3"
    assert not (folder / "model.safetensors").exists()
    whole = load_file(finished["full", "one"] / "checkpoint-3" / FILE)
    for name, tensor in load_file(folder / FILE).items():
        torch.testing.assert_close(tensor, whole[name], rtol=1e-3, atol=1e-5)
