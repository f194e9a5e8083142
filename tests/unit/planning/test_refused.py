"""What the engine cannot split a model by is in its shape, and is what the engine itself refuses."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from fourfold.base.errors import PlanError
from fourfold.models.attention import context_obstacles
from fourfold.parallel.stages import _places
from fourfold.planning.read_shape import read_shape
from tiny_models import FAMILIES, FURTHER_FAMILIES, OTHER_FAMILIES, tiny_config


@pytest.mark.parametrize("family", sorted(FAMILIES | FURTHER_FAMILIES | OTHER_FAMILIES))
def test_refused_when_read_is_what_the_engine_refuses(family: str) -> None:
    config = tiny_config(family)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    try:
        _places(model, model.get_decoder())
        stages = False
    except PlanError:
        stages = True
    axes = {axis for axis, _ in read_shape(config).refused}
    assert ("pp" in axes) == stages
    assert ("cp" in axes) == bool(list(context_obstacles(config.get_text_config(), "allgather")))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_refused_when_the_rotation_changes_with_the_row_names_cp(kind: str) -> None:
    config = tiny_config("llama")
    config.rope_parameters = {"rope_type": kind, "rope_theta": 10_000.0, "factor": 2.0} | (
        {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4} if kind == "longrope" else {}
    )
    assert [axis for axis, _ in read_shape(config).refused] == ["cp"]
