"""Shapes of the shipped models, each read once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from transformers import AutoConfig

from fourfold.planning.read_shape import read_shape
from fourfold.planning.shape import ModelShape

_FOLDER = Path(__file__).parents[3] / "examples" / "models"

ShapeOf = Callable[[str], ModelShape]


@cache
def _shape(name: str) -> ModelShape:
    return read_shape(AutoConfig.from_pretrained(_FOLDER / name))


@pytest.fixture(scope="session")
def shape_of() -> ShapeOf:
    """The shape of a folder of examples/models."""
    return _shape
