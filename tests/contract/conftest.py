"""A tiny model and data set, made once for the whole tier."""

from __future__ import annotations

from pathlib import Path

import pytest

from tiny_models import save_tiny_model
from training_runs import write_dataset


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny llama with its tokenizer."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of small data sets."""
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder)
    return folder
