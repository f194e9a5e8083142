"""What a training run must not import: each of these takes a part of a second, and the run has no use for it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from command import run_light

_NOT_NEEDED = (
    "datasets",
    "matplotlib",
    "mlflow",
    "scipy",
    "sklearn",
    "swanlab",
    "tensorboard",
    "torch._inductor.compile_fx",
    "torch.utils.tensorboard",
    "torchvision",
    "trl",
    "wandb",
)


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages that Transformers imports where it finds them."""
    for name in ("scipy", "sklearn", "torchvision"):
        (tmp_path / "installed" / name).mkdir(parents=True)
        (tmp_path / "installed" / name / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "installed"), prepend=os.pathsep)


@pytest.mark.parametrize("key", ["finetuning_type=full", "quantization_bit=4"])
def test_train_when_run_to_its_end_imports_nothing_that_it_does_not_use(words: list[str], key: str) -> None:
    done = run_light("train", *words, key, "report_to=none", "plot_loss=false", heavy=_NOT_NEEDED)
    assert done.code == 0, done.err
    assert "Saved " in done.err
    assert [line for line in done.err.splitlines() if line.startswith("imported: ")] == []
