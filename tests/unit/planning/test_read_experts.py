"""Families name their experts' numbers in many ways."""

from __future__ import annotations

import pytest

from fourfold.planning.read_shape import read_shape
from tiny_models import FURTHER_EXPERTS, MOE_FAMILIES, tiny_config


@pytest.mark.parametrize("family", sorted((*FURTHER_EXPERTS, *MOE_FAMILIES)))
def test_experts_when_read_are_those_of_the_config(family: str) -> None:
    shape = read_shape(tiny_config(family))
    assert (shape.experts, shape.experts_per_token) == (4, 2)


def test_experts_when_chosen_layer_by_layer_are_the_most_of_a_layer() -> None:
    config = tiny_config("hunyuan_v1_moe")
    config.moe_topk, config.moe_intermediate_size = [1, 2], [48, 48]
    shape = read_shape(config)
    assert (shape.experts_per_token, shape.expert_intermediate) == (2, 48)
    assert hash(shape)


def test_experts_of_gemma_4_are_those_of_the_config() -> None:
    more = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}
    shape = read_shape(tiny_config("gemma4_text", **more))
    assert (shape.experts, shape.experts_per_token, shape.expert_intermediate) == (4, 2, 16)
