"""A model whose Adam state is larger than the memory that its process may have: trained and resumed from files."""

from __future__ import annotations

import multiprocessing
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from fourfold.config.load import load
from fourfold.parallel.mesh import single
from fourfold.training import folder
from fourfold.training.assemble import load_parts
from fourfold.training.fit import fit
from tiny_models import save_tiny_model
from training_runs import config, losses

_FRESH = multiprocessing.get_context("forkserver")
"""Not a fork of this process: memory that earlier tests have freed here would be room in it beside the limit."""
_FRESH.set_forkserver_preload(["fourfold.training.assemble", "fourfold.training.fit"])
_SETTINGS: dict[str, Any] = {
    "finetuning_type": "full",
    "learning_rate": 1e-4,
    "lr_scheduler_type": "constant",
    "warmup_ratio": 0.0,
    "save_steps": 2,
    "save_sharded": True,
}
_MIB = 1 << 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of 16 million parameters."""
    folder = tmp_path_factory.mktemp("model")
    return save_tiny_model(folder, hidden_size=512, intermediate_size=2048, num_hidden_layers=4, head_dim=128)


def test_training_when_adam_does_not_fit_goes_on_in_files_and_resumes(model: Path, data: Path, tmp_path: Path) -> None:
    in_files = {"offload": "optimizer", "offload_folder": str(tmp_path / "nvme")}
    assert _train(model, data, tmp_path / "whole", max_steps=4, limited=False) == ""
    assert _train(model, data, tmp_path / "run", max_steps=2, limited=True, parallel=in_files) == ""
    more = {"max_steps": 4, "resume_from_checkpoint": True}
    assert _train(model, data, tmp_path / "run", limited=True, parallel=in_files, **more) == ""
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), abs=1e-5)
    assert losses(tmp_path / "run")[3] < losses(tmp_path / "run")[0]


@pytest.mark.parametrize("offload", ["none", "optimizer"])
def test_training_when_adam_does_not_fit_and_no_folder_is_given_fails(
    offload: str, model: Path, data: Path, tmp_path: Path
) -> None:
    """The control: the limit is below what the optimizer needs."""
    problem = _train(model, data, tmp_path / "run", max_steps=2, limited=True, parallel={"offload": offload})
    assert problem.startswith("MemoryExhaustedError")


def _train(model: Path, data: Path, output: Path, *, limited: bool, **overrides: Any) -> str:
    """Train in a process of its own; returns its error, or nothing."""
    reader, writer = _FRESH.Pipe(duplex=False)
    keys = config(model, data, output, **_SETTINGS, **overrides)
    process = _FRESH.Process(target=_run, args=(keys, limited, writer))
    process.start()
    problem = reader.recv()
    process.join(30)
    return str(problem)


def _run(keys: dict[str, Any], limited: bool, writer: Any) -> None:
    torch.set_num_threads(1)
    try:
        run = load(keys, verb="train")
        parts = load_parts(run, folder.claim(run), single(torch.device("cpu")))
        if limited:
            weights = sum(parameter.nbytes for parameter in parts.module.parameters())
            # Gradients, and the bytes of the file that is written at the end, fit; Adam's state is twice the weights.
            allowed = _data_bytes() + int(2.2 * weights) + 32 * _MIB
            assert allowed < _data_bytes() + 3 * weights
            resource.setrlimit(resource.RLIMIT_DATA, (allowed, allowed))
        fit(parts)
        writer.send("")
    except BaseException as error:
        writer.send(repr(error))


def _data_bytes() -> int:
    """Private memory that may be written to, of this process: what RLIMIT_DATA counts."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmData")) * 1024
