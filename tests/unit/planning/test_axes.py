"""Sizes of a layout that a model does not allow are told with those that it does."""

from __future__ import annotations

import pytest

from fourfold.config.parallel import ParallelConfig
from fourfold.planning.axes import ModelFacts, check_layout
from fourfold.planning.layout import Layout, resolve_layout

_MIXTURE = ModelFacts(layers=4, heads=8, kv_heads=8, intermediate=64, experts=8)
_DENSE = ModelFacts(layers=4, heads=8, kv_heads=8, intermediate=64)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(dp_shard=4, ep=2),
        Layout(dp_shard=4, ep=4),
        Layout(dp_shard=8, ep=8, dp_replicate=2),
        Layout(dp_shard=2, cp=2, ep=4),
    ],
)
def test_check_layout_when_ep_divides_experts_and_ranks_finds_nothing(layout: Layout) -> None:
    assert check_layout(layout, _MIXTURE) == []


@pytest.mark.parametrize(
    ("layout", "facts", "message"),
    [
        (
            Layout(dp_shard=6, ep=3),
            _MIXTURE,
            "parallel.ep: 3 does not divide both the 8 experts and the 6 ranks of dp_shard x cp. Use 1 or 2.",
        ),
        (
            Layout(dp_shard=4, ep=8),
            _MIXTURE,
            "parallel.ep: 8 does not divide both the 8 experts and the 4 ranks of dp_shard x cp. Use 1, 2 or 4.",
        ),
        (
            Layout(dp_shard=3, ep=3),
            _MIXTURE,
            "parallel.ep: 3 does not divide both the 8 experts and the 3 ranks of dp_shard x cp. "
            "Use 1, or other sizes than 3.",
        ),
        (
            Layout(dp_replicate=2, ep=2),
            _MIXTURE,
            "parallel.ep: 2 regroups the ranks of dp_shard x cp, and those are 1. Use strategy: fsdp "
            "(or parallel.dp_shard: 2); replicas of dp_replicate hold all experts.",
        ),
        (
            Layout(dp_shard=2, ep=2),
            _DENSE,
            "parallel.ep: 2 needs a mixture of experts, and this model is dense. Use parallel.ep: 1.",
        ),
    ],
)
def test_check_layout_when_ep_does_not_fit_tells_what_does(layout: Layout, facts: ModelFacts, message: str) -> None:
    assert check_layout(layout, facts) == [message]


@pytest.mark.parametrize(
    ("tp", "facts", "message"),
    [
        (
            2,
            ModelFacts(layers=30, heads=9, kv_heads=3, intermediate=1536),
            "parallel.tp: 2 does not divide num_attention_heads (9), and neither divides num_key_value_heads (3) nor "
            "is a multiple of it. Use 1 or 3.",
        ),
        (
            3,
            ModelFacts(layers=32, heads=32, kv_heads=8, intermediate=14336),
            "parallel.tp: 3 does not divide num_attention_heads (32) or intermediate_size (14336), and neither divides "
            "num_key_value_heads (8) nor is a multiple of it. Use 1, 2, 4, 8, 16 or 32.",
        ),
        (
            4,
            ModelFacts(layers=2, heads=4, kv_heads=4, intermediate=6),
            "parallel.tp: 4 does not divide intermediate_size (6). Use 1 or 2.",
        ),
        (
            5,
            ModelFacts(layers=2, heads=7, kv_heads=7, intermediate=9),
            "parallel.tp: 5 does not divide num_attention_heads (7) or intermediate_size (9), and neither divides "
            "num_key_value_heads (7) nor is a multiple of it. Use 1.",
        ),
    ],
)
def test_check_layout_when_tp_does_not_fit_names_in_one_line_the_sizes_that_do(
    tp: int, facts: ModelFacts, message: str
) -> None:
    assert check_layout(Layout(tp=tp), facts) == [message]


def test_resolve_layout_when_ep_is_all_that_is_given_shards() -> None:
    assert resolve_layout(ParallelConfig(ep=2), 4) == Layout(dp_shard=4, ep=2)
