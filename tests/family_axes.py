"""By which axes each family of the tests is split, and whether its rows are packed."""

from __future__ import annotations

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from fourfold.families.recurrent import MIXERS
from fourfold.families.shared_positions import is_exchangeable
from fourfold.families.tensor_styles import TENSOR_FAMILIES
from fourfold.planning.read_shape import read_shape
from tiny_models import FAMILIES, FURTHER_FAMILIES, HYBRIDS, OTHER_FAMILIES, tiny_config

EVERY_FAMILY = tuple(sorted(FAMILIES | FURTHER_FAMILIES | HYBRIDS | OTHER_FAMILIES))


def packs(family: str) -> bool:
    """Whether several samples lie in one row."""
    config = tiny_config(family)
    return family in MIXERS or is_exchangeable(config, MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])


def axes_of(family: str) -> frozenset[str]:
    """The axes that split it beside those of data."""
    shape = read_shape(tiny_config(family))
    axes = {"pp", "cp"} - {axis for axis, _ in shape.refused}
    axes |= {"tp"} if family in TENSOR_FAMILIES else set()
    return frozenset(axes | ({"ep"} if shape.experts else set()))
