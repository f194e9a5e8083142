"""Experts cut over ranks train as one process does, and each rank holds its part of them only."""

from __future__ import annotations

from typing import Any

import pytest
from harness import Case, Curve, alone, assert_same, under
from transformers import AutoConfig, AutoModelForCausalLM

from fourfold.base.errors import PlanError
from fourfold.parallel.expert import check_dispatchable, find_experts
from fourfold.planning.layout import Layout

_ATTENTION = ("q_proj", "v_proj")
CASES = {
    "qwen3_moe": Case("qwen3_moe"),
    "qwen3_moe-8-padded": Case("qwen3_moe", packed=False, max_tokens=32, overrides=(("num_experts", 8),)),
    "qwen3_moe-lora": Case("qwen3_moe", tuning="lora"),
    "qwen3_moe-lora-attention": Case("qwen3_moe", tuning="lora", targets=_ATTENTION),
    "mixtral": Case("mixtral"),
    "mixtral-lora-padded": Case("mixtral", tuning="lora", packed=False),
    "gpt_oss": Case("gpt_oss"),
    "gpt_oss-lora": Case("gpt_oss", tuning="lora"),
    "deepseek_v3": Case("deepseek_v3"),
    "deepseek_v3-lora-padded": Case("deepseek_v3", tuning="lora", packed=False),
}
LAYOUTS = {
    "ep2": Layout(dp_shard=2, ep=2),
    "ep4": Layout(dp_shard=4, ep=4),
    "fsdp2xep2": Layout(dp_shard=4, ep=2),
    "zero1-ep2": Layout(dp_shard=2, ep=2, zero=1),
    "hsdp2xep2": Layout(dp_replicate=2, dp_shard=2, ep=2),
}
COVER = {
    ("qwen3_moe", "ep2"),
    ("qwen3_moe-8-padded", "ep4"),
    ("qwen3_moe-lora", "fsdp2xep2"),
    ("qwen3_moe-lora-attention", "ep2"),
    ("mixtral", "zero1-ep2"),
    ("gpt_oss", "fsdp2xep2"),
    ("gpt_oss-lora", "ep2"),
    ("deepseek_v3", "hsdp2xep2"),
}


@pytest.fixture(scope="module")
def references() -> dict[str, Curve]:
    """The curves of one process, as they are needed."""
    return {}


def _reference(case: str, references: dict[str, Curve]) -> Curve:
    if case not in references:
        references[case] = alone(CASES[case])
    return references[case]


def _cells() -> list[Any]:
    """Every case under every layout; those beyond the cover are for the grid."""
    return [
        pytest.param(case, layout, marks=() if (case, layout) in COVER else pytest.mark.grid)
        for case in CASES
        for layout in LAYOUTS
    ]


@pytest.mark.parametrize(("case", "layout"), _cells())
def test_training_when_experts_are_cut_equals_one_process(case: str, layout: str, references: dict[str, Curve]) -> None:
    reference = _reference(case, references)
    for curve in under(CASES[case], LAYOUTS[layout]):
        assert_same(curve, reference, loss=5e-5)


def test_router_loss_when_experts_are_cut_equals_sharding_alone() -> None:
    """The balancing loss is one of a micro-batch, so it is compared where the micro-batches are the same."""
    case = Case("mixtral", router=0.1)
    reference = under(case, Layout(dp_shard=2))[0]
    assert reference.losses != pytest.approx(alone(Case("mixtral")).losses, abs=1e-2)
    for curve in under(case, Layout(dp_shard=2, ep=2)):
        assert_same(curve, reference, loss=5e-5)


def test_router_when_all_tokens_choose_one_rank_leaves_the_other_without_work() -> None:
    """DeepSeek's groups of experts lie on different ranks here; a bias makes every token choose the first group."""
    case = Case("deepseek_v3", bias_router=True)
    reference = alone(case)
    for curve in under(case, Layout(dp_shard=2, ep=2)):
        assert_same(curve, reference, loss=5e-5)
        experts = {n: g for n, g in curve.gradients.items() if "experts.down_proj" in n and "shared" not in n}
        touched = [float(g.abs().sum()) > 0 for g in experts.values()]
        held = [curve.shares[name].cuts[0].ranges[0][0] for name in experts]
        assert touched == [start == 0 for start in held]
        # two of four experts get one half each: shares 1/2 1/2 0 0, their deviation 1/4 over their mean 1/4
        assert curve.metrics == {"expert_max_share": 0.5, "expert_load_cv": 1.0}


def test_load_when_experts_are_cut_is_that_of_all_ranks(references: dict[str, Curve]) -> None:
    reference = _reference("qwen3_moe", references)
    assert 0.25 < reference.metrics["expert_max_share"] <= 0.5  # of four experts two are chosen
    for curve in under(CASES["qwen3_moe"], LAYOUTS["ep2"]):
        assert curve.metrics == pytest.approx(reference.metrics, abs=0.01)


def test_experts_when_they_have_a_forward_of_their_own_are_refused() -> None:
    config = AutoConfig.for_model(
        "llama4_text",
        hidden_size=16,
        intermediate_size=16,
        intermediate_size_mlp=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=32,
        num_local_experts=2,
        pad_token_id=0,
    )
    ((name, experts),) = find_experts(AutoModelForCausalLM.from_config(config))
    with pytest.raises(PlanError) as error:
        check_dispatchable(name, experts)
    assert str(error.value) == (
        f"parallel.ep: the experts of this model ({name}, Llama4TextExperts) have a forward pass of their own, so "
        "their tokens cannot be sent to other ranks. Use parallel.ep: 1; dp_shard shards them."
    )
