"""Experts cut over ranks train as one process does, and each rank holds its part of them only."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from harness import Case, Curve, alone, assert_same, assert_together_same, run_ranks, under
from transformers import AutoConfig, AutoModelForCausalLM

from fourfold.base.errors import PlanError
from fourfold.parallel.dispatch import regroup
from fourfold.parallel.expert import check_experts, split_experts
from fourfold.parallel.local_experts import use_local_experts
from fourfold.parallel.mesh import build_mesh
from fourfold.parallel.shares import Shares
from fourfold.planning.layout import Layout
from tiny_models import tiny_model

_ATTENTION = ("q_proj", "v_proj")
CASES = {
    "qwen3_moe": Case("qwen3_moe"),
    "qwen3_moe-8-padded": Case("qwen3_moe", packed=False, max_tokens=32, overrides=(("num_experts", 8),)),
    "qwen3_moe-lora": Case("qwen3_moe", tuning="lora"),
    "qwen3_moe-lora-attention": Case("qwen3_moe", tuning="lora", targets=_ATTENTION),
    # columns of a 4-bit weight are cut in blocks of 64
    "qwen3_moe-qlora": Case(
        "qwen3_moe",
        tuning="qlora",
        overrides=(("hidden_size", 128), ("head_dim", 64), ("moe_intermediate_size", 64), ("initializer_range", 0.05)),
    ),
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
    "ep2xtp2": Layout(dp_shard=2, ep=2, tp=2),
    "ep2xpp2": Layout(dp_shard=2, ep=2, pp=2),
    "ep2xcp2": Layout(cp=2, ep=2),
    "ep4xcp2": Layout(dp_shard=2, cp=2, ep=4),
}
COVER = {
    ("qwen3_moe", "ep2"),
    ("qwen3_moe-8-padded", "ep4"),
    ("qwen3_moe-lora", "fsdp2xep2"),
    ("qwen3_moe-lora-attention", "ep2"),
    ("qwen3_moe-qlora", "ep2"),
    ("mixtral", "zero1-ep2"),
    ("gpt_oss", "fsdp2xep2"),
    ("gpt_oss-lora", "ep4"),
    ("deepseek_v3", "hsdp2xep2"),
    ("deepseek_v3-lora-padded", "ep2xtp2"),
    ("mixtral", "ep2xcp2"),
    ("qwen3_moe", "ep2xpp2"),
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
    curves = under(CASES[case], LAYOUTS[layout])
    assert_together_same(curves, reference, loss=5e-5)
    if LAYOUTS[layout].pp == 1:
        assert all(curve.gradients.keys() == reference.gradients.keys() for curve in curves)


def test_router_loss_when_experts_are_cut_equals_sharding_alone() -> None:
    """The balancing loss is one of a micro-batch, so it is compared where the micro-batches are the same."""
    case = Case("mixtral", router=0.1)
    reference = under(case, Layout(dp_shard=2))[0]
    assert reference.losses != pytest.approx(alone(Case("mixtral")).losses, abs=1e-2)
    for curve in under(case, Layout(dp_shard=2, ep=2)):
        assert_same(curve, reference, loss=5e-5)


@pytest.mark.parametrize("layout", [Layout(pp=2), pytest.param(Layout(dp_shard=2, ep=2, pp=2), marks=pytest.mark.grid)])
def test_router_loss_when_layers_lie_in_stages_is_that_of_all_layers(layout: Layout) -> None:
    case = Case("mixtral", router=0.1, max_tokens=24)  # more micro-batches than two stages ask for
    reference = alone(case) if layout.dp == 1 else under(case, Layout(dp_shard=2))[0]
    assert_together_same(under(case, layout), reference, loss=5e-5)


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


@pytest.mark.parametrize("layout", ["ep2", "ep2xpp2"])
def test_load_when_experts_are_cut_is_that_of_all_ranks(layout: str, references: dict[str, Curve]) -> None:
    reference = _reference("qwen3_moe", references)
    assert 0.25 < reference.metrics["expert_max_share"] <= 0.5  # of four experts two are chosen
    padded = alone(Case("qwen3_moe", packed=False, max_tokens=32))
    for curve in [padded, *under(CASES["qwen3_moe"], LAYOUTS[layout])]:
        assert curve.metrics == pytest.approx(reference.metrics, abs=1e-6)


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
    with pytest.raises(PlanError) as error:
        check_experts(AutoModelForCausalLM.from_config(config), 2)
    assert str(error.value) == (
        "parallel.ep: the experts of this model (model.layers.0.feed_forward.experts, Llama4TextExperts) have a "
        "forward pass of their own, so tokens cannot be sent to them on other ranks. Use parallel.ep: 1; dp_shard "
        "shards them."
    )


def test_experts_when_a_model_has_none_stacked_are_refused() -> None:
    with pytest.raises(PlanError, match=r"ep: 2 ranks cannot share the experts of this model \(LlamaForCausalLM\)"):
        check_experts(tiny_model("llama"), 2)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_dispatch_when_a_token_chooses_no_expert_gives_what_the_experts_give(implementation: str) -> None:
    for close in run_ranks(2, partial(_dispatch_with_skips, implementation)):
        assert close


def _dispatch_with_skips(implementation: str) -> bool:
    """Whether dispatched experts, some tokens of which skip them, give the same outputs and gradients."""
    model = tiny_model("qwen3_moe")
    model.set_experts_implementation("eager")  # grouped products take no such choices unless told of them
    whole = model.model.layers[0].mlp.experts
    cut = copy.deepcopy(whole)
    use_local_experts(cut)
    cut.config = copy.deepcopy(cut.config)
    cut.config._experts_implementation = implementation
    mesh = build_mesh(Layout(dp_shard=2, ep=2), torch.device("cpu"))
    split_experts(cut, mesh, Shares())
    generator = torch.Generator().manual_seed(mesh.rank)
    tokens = torch.randn(6, 32, generator=generator)
    indices = torch.tensor([[0, 4], [4, 4], [3, 1], [2, 4], [1, 0], [4, 3]])  # of four experts; 4 is none
    weights = torch.rand(6, 2, generator=generator) * (indices < 4)
    found = []
    for experts in (whole, cut):
        given = tokens.clone().requires_grad_()
        output = experts(given, indices, weights)
        output.square().sum().backward()
        assert given.grad is not None
        found.append((output.detach(), given.grad))
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(*found, strict=True))


def test_regroup_gives_rows_by_expert_and_the_way_back() -> None:
    arrived = torch.tensor([[2, 0, 1], [1, 0, 0], [0, 0, 2]])  # from three ranks, for three experts
    by_expert, by_sender, ends = regroup(arrived, 6)
    assert by_expert.tolist() == [0, 1, 3, 2, 4, 5]  # of the first expert two rows of rank 0 and one of rank 1, ...
    assert by_sender.tolist() == [0, 1, 3, 2, 4, 5]
    assert ends.tolist() == [3, 3, 6]
    by_expert, by_sender, _ = regroup(torch.tensor([[1, 2], [3, 1]]), 7)
    assert by_expert.tolist() == [0, 3, 4, 5, 1, 2, 6]
    assert by_expert[by_sender].tolist() == list(range(7))
