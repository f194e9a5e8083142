"""By which axes each family of the tests is split, and whether its rows are packed."""

from __future__ import annotations

from fourfold.families.tensor_styles import TENSOR_FAMILIES
from fourfold.models.forward import supports_packing
from fourfold.planning.read_shape import read_shape
from tiny_models import tiny_config, tiny_model


def packs(family: str) -> bool:
    """Whether several samples lie in one row."""
    return supports_packing(tiny_model(family))


def axes_of(family: str) -> frozenset[str]:
    """The axes that split it beside those of data."""
    shape = read_shape(tiny_config(family))
    axes = {"pp", "cp"} - {axis for axis, _ in shape.refused}
    axes |= {"tp"} if family in TENSOR_FAMILIES else set()
    return frozenset(axes | ({"ep"} if shape.experts else set()))
