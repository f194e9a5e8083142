"""Whole runs with experts cut over processes: the losses of one process, and checkpoints that any layout resumes."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from fourfold.base.errors import PlanError
from fourfold.checkpoint.folder import list_checkpoints
from tiny_models import save_tiny_model
from training_runs import losses, run

LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "fsdp2": {"nproc": 2, "strategy": "fsdp"},
    "ep2": {"nproc": 2, "strategy": "fsdp", "parallel": {"ep": 2}},
    "ep2xtp2": {"nproc": 4, "strategy": "fsdp", "parallel": {"ep": 2, "tp": 2}},
}
TUNINGS: dict[str, dict[str, Any]] = {
    "full": {"finetuning_type": "full", "learning_rate": 1e-3},
    "lora": {"lora_target": "all", "gradient_checkpointing": True},
}
_SETTINGS = {"global_batch_size": 4, "max_steps": 8, "save_steps": 2, "lora_dropout": 0.0}
_FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny qwen3_moe, whose weights are saved under the names of single experts."""
    return save_tiny_model(tmp_path_factory.mktemp("model") / "qwen3_moe", "qwen3_moe")


def _run(model: Path, data: Path, output: Path, tuning: str, layout: str, **overrides: Any) -> None:
    """Train in a process of its own: where there is a GPU, one that has run a backward pass cannot fork workers."""
    settings = {**_SETTINGS, **TUNINGS[tuning], **LAYOUTS[layout], **overrides}
    process = _FORK.Process(target=run, args=(model, data, output), kwargs=settings)
    process.start()
    process.join()
    assert process.exitcode == 0


@pytest.mark.parametrize(
    ("tuning", "chain"), [("full", ("ep2", "fsdp2", "ep2xtp2", "one")), ("lora", ("fsdp2", "ep2", "one"))]
)
def test_run_when_resumed_under_other_layouts_goes_on_as_one_process(
    tuning: str, chain: tuple[str, ...], model: Path, data: Path, tmp_path: Path
) -> None:
    _run(model, data, tmp_path / "one", tuning, "one")
    expected, folder = losses(tmp_path / "one"), tmp_path / "run"
    assert len(expected) == 8
    for leg, layout in enumerate(chain):
        _run(model, data, folder, tuning, layout, **({"resume_from_checkpoint": True} if leg else {}))
        assert losses(folder) == pytest.approx(expected, abs=5e-5), layout
        for step, checkpoint in list_checkpoints(folder):
            if step > 2 * (leg + 1):  # the next leg goes on two steps further on
                shutil.rmtree(checkpoint)
    row = json.loads((folder / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert 0.25 < row["expert_max_share"] <= 0.5
    if tuning == "full":
        whole, cut = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (tmp_path / "one", folder))
        assert {name: tensor.shape for name, tensor in cut.items()} == {n: t.shape for n, t in whole.items()}


def test_run_when_ep_divides_nothing_says_what_does(model: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(
        PlanError, match=r"ep: 2 regroups the ranks of dp_shard x cp, and those are 1. Use strategy: fsdp"
    ):
        run(model, data, tmp_path, nproc=2, strategy="ddp", parallel={"ep": 2})
