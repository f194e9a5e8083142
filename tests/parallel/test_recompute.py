"""Training does not depend on what the backward pass computes again; what is kept for it does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from harness import Case, Curve, alone, assert_same, assert_together_same, make_model, under
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fourfold.models.lora import use_short_forward
from fourfold.models.noise import NoiseKeys
from fourfold.models.unwrap import base_model
from fourfold.parallel.recompute import Recompute, settings
from fourfold.planning.layout import Layout
from fourfold.training.memory import enable_recompute

KINDS: tuple[Recompute, ...] = ("selective", "full")
CASES = {
    "llama-full": Case(),
    "llama-lora-dropout": Case(tuning="lora", dropout=0.2),
    "llama-lora-padded": Case(tuning="lora", packed=False),
    "gpt-oss-full": Case(family="gpt_oss"),
    "qwen3-moe-experts": Case(family="qwen3_moe", tuning="lora"),
    "qwen3-moe-lora": Case(family="qwen3_moe", tuning="lora", targets=("q_proj", "v_proj")),
}


def _with(case: Case, kind: Recompute) -> Case:
    return replace(case, recompute=kind)


@pytest.fixture(scope="module")
def references() -> dict[str, Curve]:
    """The curves without recompute."""
    torch.set_num_threads(1)
    return {name: alone(case) for name, case in CASES.items()}


@pytest.mark.parametrize("case", sorted(CASES))
@pytest.mark.parametrize("kind", KINDS)
def test_training_when_recomputed_equals_without(kind: Recompute, case: str, references: dict[str, Curve]) -> None:
    assert_same(alone(_with(CASES[case], kind)), references[case], loss=1e-6)


@pytest.mark.parametrize(
    ("layout", "case"),
    [
        (Layout(dp_shard=2), "llama-full"),
        (Layout(dp_shard=2), "llama-lora-dropout"),
        (Layout(dp_replicate=2), "llama-lora-dropout"),
        (Layout(tp=2), "llama-full"),
        (Layout(pp=2), "llama-lora-dropout"),
    ],
    ids=lambda value: value.describe() if isinstance(value, Layout) else value,
)
def test_training_when_split_and_selectively_recomputed_equals_one_process(
    layout: Layout, case: str, references: dict[str, Curve]
) -> None:
    assert_together_same(under(_with(CASES[case], "selective"), layout), references[case])


@pytest.mark.parametrize("kind", KINDS)
def test_training_when_a_layer_is_spared_equals_without(kind: Recompute, references: dict[str, Curve]) -> None:
    spared = replace(_with(CASES["llama-lora-dropout"], kind), spared=1)
    assert_same(alone(spared), references["llama-lora-dropout"], loss=1e-6)


@pytest.mark.parametrize("layout", [Layout(dp_shard=2), Layout(tp=2)], ids=Layout.describe)
def test_training_when_split_and_a_layer_is_spared_equals_one_process(
    layout: Layout, references: dict[str, Curve]
) -> None:
    spared = replace(_with(CASES["llama-full"], "full"), spared=1)
    assert_together_same(under(spared, layout), references["llama-full"])


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")  # torch 2.11
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_bytes_kept_when_recomputed_are_fewer(tuning: str) -> None:
    kept: dict[Recompute, int] = {kind: _kept_bytes(tuning, kind) for kind in ("none", *KINDS)}
    assert kept["full"] < 0.5 * kept["selective"]
    assert kept["selective"] < 0.8 * kept["none"]


def test_context_when_a_product_is_changed_in_place_is_an_error() -> None:
    """Why an adapted layer is one operator: adding to a product that is kept would add twice."""
    x, weight = torch.ones(2, 2, requires_grad=True), torch.ones(2, 2)

    def layer(x: Tensor) -> Tensor:
        with torch.no_grad():
            disturbed = (x @ weight).add_(1.0)
        return (x * disturbed).tanh()

    y = checkpoint(layer, x, **settings("selective"))
    with pytest.raises(RuntimeError, match="mutated"):
        y.sum().backward()


def test_recompute_when_another_micro_batch_was_entered_sees_its_own_keys() -> None:
    noise = NoiseKeys(seed=1)
    noise.tokens = torch.tensor([[1]], dtype=torch.int32)
    again = noise.remembered()
    noise.tokens = torch.tensor([[2]], dtype=torch.int32)
    with again():
        assert int(noise.tokens) == 1
    assert int(noise.tokens) == 2


def _kept_bytes(tuning: str, kind: Recompute) -> int:
    """Bytes that a forward pass allocates and that still live after it, by the allocator's count."""
    module = make_model(Case(tuning=tuning)).train()
    use_short_forward(module)
    if kind != "none":
        enable_recompute(module, kind, NoiseKeys(seed=0))
    ids = torch.arange(64)[None]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        output = base_model(module).get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    assert output.requires_grad
    return sum(event.self_cpu_memory_usage for event in profile.key_averages())
