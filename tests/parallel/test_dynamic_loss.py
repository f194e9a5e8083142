"""The loss of dynamic fine-tuning, which depends on probabilities, is the same under every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from training_runs import losses, run

LAYOUTS: dict[str, dict[str, Any]] = {
    "fsdp2": {"nproc": 2, "strategy": "fsdp"},
    "tp2": {"nproc": 2, "strategy": "tp"},
    "pp2": {"nproc": 2, "strategy": "pp"},
    "cp2": {"nproc": 2, "parallel": {"cp": 2}},
}
_KEYS: dict[str, Any] = {
    "finetuning_type": "full",
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "warmup_ratio": 0.0,
    "global_batch_size": 6,
    "max_steps": 4,
    "save_strategy": "no",
    "val_size": 4,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "use_cpu": True,
}


@pytest.fixture(scope="module")
def alone(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Runs of one process without and with it."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("alone")
    for dynamic in (False, True):
        run(model, data, folder / str(dynamic), **_KEYS, use_dft_loss=dynamic)
    return {dynamic: folder / str(dynamic) for dynamic in (False, True)}


def test_loss_when_dynamic_is_smaller_and_learns_otherwise(alone: dict[bool, Path]) -> None:
    plain, dynamic = losses(alone[False]), losses(alone[True])
    assert dynamic[0] < plain[0] / 5  # probabilities of a model that knows nothing are small
    assert dynamic != pytest.approx(plain, rel=1e-2)


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_loss_when_dynamic_is_that_of_one_process_under_every_layout(
    alone: dict[bool, Path], model: Path, data: Path, tmp_path: Path, layout: str
) -> None:
    run(model, data, tmp_path, **_KEYS, **LAYOUTS[layout], use_dft_loss=True)
    for key in ("loss", "grad_norm", "eval_loss"):
        assert losses(alone[True], key)
        assert losses(tmp_path, key) == pytest.approx(losses(alone[True], key), rel=1e-4, abs=1e-6)
