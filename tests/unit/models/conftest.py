"""A tiny model folder and a way to load it, shared by the tests of models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fourfold.config.model import ModelConfig
from fourfold.models.load import load_model
from tiny_models import Load, Logits, save_tiny_model

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture
def load(llama_folder: Path) -> Load:
    """Load the tiny llama (or another folder) with further config keys."""

    def load_with(folder: Path = llama_folder, **keys: Any) -> tuple[PreTrainedModel, ModelConfig]:
        config = ModelConfig(model_name_or_path=str(folder), **keys)
        return load_model(config, dtype=torch.float32, device=CPU), config

    return load_with


@pytest.fixture
def logits() -> Logits:
    """Logits of a model on fixed tokens [1, 16, vocabulary]."""

    @torch.no_grad()
    def compute(model: nn.Module) -> Tensor:
        return model(input_ids=torch.arange(16)[None] * 5).logits

    return compute
