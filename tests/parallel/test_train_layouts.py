"""Whole runs over several processes: the same losses, checkpoints that resume under any other layout, and failures."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from fourfold.base.errors import PlanError
from fourfold.base.log import setup_logging
from fourfold.checkpoint.folder import list_checkpoints, verify, write_folder
from fourfold.config.load import load
from fourfold.parallel.launch import WorkerError
from fourfold.training.run import train
from training_runs import config, losses, run

LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "ddp2": {"nproc": 2, "strategy": "ddp"},
    "zero1-2": {"nproc": 2, "strategy": "zero1"},
    "zero2-4": {"nproc": 4, "strategy": "zero2"},
    "fsdp3": {"nproc": 3, "strategy": "fsdp"},
    "hsdp4": {"nproc": 4, "strategy": "hsdp"},
    "tp2": {"nproc": 2, "strategy": "tp"},
    "pp2": {"nproc": 2, "strategy": "pp"},
    "fsdp2xtp2": {"nproc": 4, "strategy": "fsdp", "parallel": {"tp": 2}},
}
TUNINGS: dict[str, dict[str, Any]] = {
    "lora": {"lora_dropout": 0.1},
    "full": {"finetuning_type": "full", "learning_rate": 1e-3, "lora_dropout": 0.0},
}
_FORK = multiprocessing.get_context("fork")


def settings_of(tuning: str, layout: str) -> dict[str, Any]:
    """Keys of a whole run."""
    # 22 samples in steps of 4: with 3 or 4 ranks the last step of an epoch leaves some without a sample.
    return {"global_batch_size": 4, "max_steps": 9, "val_size": 2, **TUNINGS[tuning], **LAYOUTS[layout]}


def run_apart(model: Path, data: Path, output: Path, **overrides: Any) -> None:
    """Train in a process of its own: where there is a GPU, one that has run a backward pass cannot fork workers."""
    process = _FORK.Process(target=run, args=(model, data, output), kwargs=overrides)
    process.start()
    process.join()
    assert process.exitcode == 0


@pytest.fixture(scope="module")
def finished(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """A whole run under each layout, with checkpoints at steps 3, 6 and 9."""
    root, folders = tmp_path_factory.mktemp("runs"), {}
    for tuning in TUNINGS:
        for layout in LAYOUTS:
            folders[tuning, layout] = root / f"{tuning}-{layout}"
            run_apart(model, data, folders[tuning, layout], **settings_of(tuning, layout))
    return folders


@pytest.mark.parametrize("tuning", sorted(TUNINGS))
@pytest.mark.parametrize("layout", sorted(set(LAYOUTS) - {"one"}))
def test_run_when_split_logs_the_losses_of_one_process(
    tuning: str, layout: str, finished: dict[tuple[str, str], Path]
) -> None:
    assert losses(finished[tuning, layout]) == pytest.approx(losses(finished[tuning, "one"]), abs=1e-5)


def _pairs() -> list[Any]:
    """Every pair of layouts and tuning; those beyond a cover are for the grid.

    Covered: full tuning from and to one process, LoRA from each layout to the next.
    """
    pairs, names = [], sorted(LAYOUTS)
    for before in names:
        for after in names:
            for tuning in sorted(TUNINGS):
                follows = names.index(after) == (names.index(before) + 1) % len(names)
                covered = ("one" in (before, after)) and before != after if tuning == "full" else follows
                pairs.append(pytest.param(before, after, tuning, marks=() if covered else pytest.mark.grid))
    return pairs


@pytest.mark.parametrize(("before", "after", "tuning"), _pairs())
def test_resume_when_under_another_layout_goes_on_as_if_never_stopped(
    before: str, after: str, tuning: str, model: Path, data: Path, finished: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished[tuning, before], folder)
    shutil.rmtree(folder / "checkpoint-9")
    run_apart(model, data, folder, resume_from_checkpoint=True, **settings_of(tuning, after))
    assert losses(folder) == pytest.approx(losses(finished[tuning, "one"]), abs=1e-5)


def test_resume_when_the_optimizer_state_is_emptied_differs(
    model: Path, data: Path, finished: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    """The control: the test above would notice a resume that loses the moments."""
    folder = tmp_path / "run"
    shutil.copytree(finished["full", "fsdp3"], folder)
    shutil.rmtree(folder / "checkpoint-9")
    newest = folder / "checkpoint-6"

    def without_moments(target: Path) -> None:
        shutil.copytree(newest, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
        path = target / "optimizer.safetensors"
        save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(path).items()}, path)

    write_folder(newest, without_moments)
    run_apart(model, data, folder, resume_from_checkpoint=True, **settings_of("full", "ddp2"))
    assert losses(folder) != pytest.approx(losses(finished["full", "one"]), abs=1e-4)


def _kills() -> list[Any]:
    """Which worker is killed, and how many seconds after the first checkpoint: three, and seventeen for the grid."""
    moments = random.Random(0)
    more = [(moments.randrange(4), moments.uniform(0.0, 0.3)) for _ in range(17)]
    return [(0, 0.0), (1, 0.0), (3, 0.0), *(pytest.param(*kill, marks=pytest.mark.grid) for kill in more)]


@pytest.mark.parametrize(("victim", "delay"), _kills())
def test_run_when_a_worker_is_killed_ends_and_resumes_exactly(
    victim: int, delay: float, model: Path, data: Path, finished: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    settings = {**settings_of("full", "hsdp4"), "save_steps": 1}
    cfg = config(model, data, tmp_path, **settings)
    parent = _FORK.Process(target=_expect_worker_error, args=(cfg,))
    parent.start()
    deadline = time.monotonic() + 60
    while not (list_checkpoints(tmp_path)) and time.monotonic() < deadline and parent.is_alive():
        time.sleep(0.01)
    workers = psutil.Process(parent.pid).children()
    assert len(workers) == 4
    time.sleep(delay)
    os.kill(workers[victim].pid, signal.SIGKILL)
    started = time.monotonic()
    parent.join(60)
    assert parent.exitcode == 7
    assert time.monotonic() - started < 30
    assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)
    verify(list_checkpoints(tmp_path)[-1][1])
    run_apart(model, data, tmp_path, resume_from_checkpoint=True, **settings)
    assert losses(tmp_path) == pytest.approx(losses(finished["full", "one"]), abs=1e-5)


def _expect_worker_error(cfg: dict[str, Any]) -> None:
    try:
        train(load(cfg, verb="train"))
    except WorkerError as error:
        told = ("was killed by SIGKILL", "The last checkpoint is ", "resume_from_checkpoint=true")
        os._exit(7 if all(text in str(error) for text in told) else 8)
    os._exit(9)


def test_run_when_sizes_do_not_multiply_says_what_would(model: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"dp_shard 4 make 4 ranks, but there are 2 processes.*--nproc 4"):
        run(model, data, tmp_path, nproc=2, parallel={"dp_shard": 4})


def test_run_when_a_worker_raises_shows_it_once_and_the_data_once(
    model: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    setup_logging()
    with pytest.raises(WorkerError, match="lora_target"):
        run(model, data, tmp_path, nproc=2, lora_target="nothing_like_it")
    told = capfd.readouterr().err.splitlines()
    assert len([line for line in told if line.startswith("dataset tiny (train): 22 of 22 rows")]) == 1
