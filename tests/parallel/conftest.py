"""What whole runs over several processes train on, unless a file has its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tiny_models import save_tiny_model
from training_runs import write_dataset


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny qwen3, whose embeddings are tied."""
    return save_tiny_model(tmp_path_factory.mktemp("model") / "qwen3", "qwen3")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny data sets."""
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder)
    return folder
