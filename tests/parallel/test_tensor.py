"""Tensor parallelism trains as one process does: matrices, positions and vocabulary shared by ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from harness import (
    Case,
    Curve,
    alone,
    assert_same,
    assert_together_same,
    largest_of,
    make_model,
    run_ranks,
    train,
    under,
)
from transformers import CONFIG_MAPPING

from fourfold.models.unpacked import keep_unpacked
from fourfold.parallel.mesh import Mesh, build_mesh, single
from fourfold.parallel.tensor import FAMILIES as TENSOR_FAMILIES
from fourfold.planning.layout import Layout
from tiny_models import FURTHER_EXPERTS, MOE_FAMILIES

FAMILIES = [  # of this version of Transformers; gemma4, whose tiny models round much, has a test of its own
    family for family in TENSOR_FAMILIES if family in CONFIG_MAPPING and family != "gemma4_text"
]
_CPU = torch.device("cpu")
_MILD = (("initializer_range", 0.1),)
"""Weights that magnify rounding less than the usual ones of the tests do."""

LAYOUTS = {
    "tp2": Layout(tp=2),
    "tp2-no-sp": Layout(tp=2, sequence_parallel=False),
    "tp2-no-lp": Layout(tp=2, loss_parallel=False),
    "tp4": Layout(tp=4),
    "fsdp2xtp2": Layout(dp_shard=2, tp=2),
    "ddp2xtp2": Layout(dp_replicate=2, tp=2),
}
CASES = {
    "llama-full": Case(),
    "llama-lora-padded": Case(tuning="lora", packed=False),
    "qwen3-full-tied": Case(family="qwen3"),
    # columns of a 4-bit weight are cut in blocks of 64
    "llama-qlora": Case(
        tuning="qlora",
        overrides=(("hidden_size", 128), ("head_dim", 64), ("intermediate_size", 256), ("initializer_range", 0.05)),
    ),
}


@pytest.fixture(scope="module")
def references() -> dict[str, Curve]:
    """The curves of one process."""
    torch.set_num_threads(1)
    return {name: alone(case) for name, case in CASES.items()}


COVER = {
    ("tp2", "llama-full"),
    ("tp2-no-sp", "llama-lora-padded"),
    ("tp2-no-lp", "qwen3-full-tied"),
    ("tp4", "llama-full"),
    ("tp4", "llama-qlora"),
    ("fsdp2xtp2", "llama-lora-padded"),
    ("ddp2xtp2", "qwen3-full-tied"),
}
"""Every layout and every case once or twice; the rest is for the grid."""


def _cells() -> list[Any]:
    cells = [(layout, case) for layout in sorted(LAYOUTS) for case in sorted(CASES)]
    return [pytest.param(*cell, marks=() if cell in COVER else pytest.mark.grid) for cell in cells]


@pytest.mark.parametrize(("layout", "case"), _cells())
def test_training_when_matrices_are_shared_equals_one_process(
    layout: str, case: str, references: dict[str, Curve]
) -> None:
    for curve in under(CASES[case], LAYOUTS[layout]):
        assert_same(curve, references[case])


@pytest.mark.parametrize("family", ["llama", "starcoder2", "phi3"])
@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(tp=2, pp=2)], ids=["tp2", "tp2xpp2"])
def test_training_when_parts_of_4_bits_are_unpacked_for_good_equals_one_process(layout: Layout, family: str) -> None:
    """Of layers with biases, too, and of those that gather what the ranks have."""
    case = replace(CASES["llama-qlora"], family=family, steps=(0, 1, 4))

    def work() -> tuple[list[int], Curve]:
        counts: list[int] = []
        curve = train(
            case,
            build_mesh(layout, _CPU),
            before=lambda model, split: counts.append(keep_unpacked(model.module)),
        )
        return counts, curve

    expected = alone(case)
    found = run_ranks(layout.world_size, work)
    assert all(counts[0] > 0 and not any(counts[1:]) for counts, _ in found)
    assert_together_same([curve for _, curve in found], expected)


def _all_families(mesh_of: Callable[[], Mesh], names: Sequence[str]) -> dict[str, Curve]:
    mesh = mesh_of()
    return {name: train(Case(family=name, overrides=_MILD), mesh) for name in names}


@pytest.mark.parametrize("layout", ["tp2", "tp2-no-sp"])
def test_training_when_matrices_are_shared_equals_one_process_for_every_family(layout: str) -> None:
    [references] = run_ranks(1, lambda: _all_families(lambda: single(_CPU), FAMILIES))
    for found in run_ranks(2, lambda: _all_families(lambda: build_mesh(LAYOUTS[layout], _CPU), FAMILIES)):
        for name, curve in found.items():
            assert_same(curve, references[name], loss=5e-5 if name in (*MOE_FAMILIES, *FURTHER_EXPERTS) else 1e-5)


_APART = (
    ("num_kv_shared_layers", 0),
    ("hidden_size_per_layer_input", 0),
    ("attention_k_eq_v", True),
    ("num_global_key_value_heads", 1),
)
_GEMMA4 = {
    "small": Case(family="gemma4_text", overrides=_MILD),
    "small-lora-padded": Case(family="gemma4_text", tuning="lora", packed=False, overrides=_MILD),
    "dense": Case(family="gemma4_text", overrides=(*_MILD, *_APART)),
    "experts-padded": Case(
        family="gemma4_text",
        packed=False,
        overrides=(
            *_MILD,
            *_APART,
            ("enable_moe_block", True),
            ("num_experts", 4),
            ("top_k_experts", 2),
            ("moe_intermediate_size", 16),
        ),
    ),
}


def _gemma4(mesh_of: Callable[[], Mesh]) -> dict[str, Curve]:
    mesh = mesh_of()
    return {name: train(replace(case, steps=(0, 1, 4)), mesh, exact=True) for name, case in _GEMMA4.items()}


@pytest.mark.skipif("gemma4_text" not in CONFIG_MAPPING, reason="this version of Transformers has no Gemma 4")
@pytest.mark.parametrize("layout", ["tp2", "tp2-no-sp", "tp4", pytest.param("fsdp2xtp2", marks=pytest.mark.grid)])
def test_training_of_gemma4_when_matrices_are_shared_equals_one_process(layout: str) -> None:
    """In fp64 but for its norms: layers differ in their key heads, share keys, are given their own inputs of all
    positions, and have routers beside their experts."""
    [references] = run_ranks(1, lambda: _gemma4(lambda: single(_CPU)))
    plan = LAYOUTS[layout]
    for found in run_ranks(plan.world_size, lambda: _gemma4(lambda: build_mesh(plan, _CPU))):
        for name, curve in found.items():
            assert curve.losses == pytest.approx(references[name].losses, abs=1e-5)
            largest = largest_of(references[name])
            for key, grad in curve.gradients.items():
                whole = references[name].gradients[key]
                part = curve.shares[key].take(whole) if key in curve.shares else whole
                assert float((part - grad).abs().max()) <= 1e-6 * largest, (name, key)


def test_bytes_when_matrices_are_shared_are_a_share_on_each_rank() -> None:
    """Every matrix is held once over all ranks, norms by each; the optimizer's two moments likewise."""
    norms = sum(parameter.numel() for parameter in make_model(Case()).parameters() if parameter.ndim == 1)
    whole = alone(Case())
    for layout in (Layout(tp=2), Layout(dp_shard=2, tp=2)):
        curves = under(Case(), layout)
        assert sum(curve.local_numel for curve in curves) == whole.local_numel + norms * (layout.tp - 1)
        assert all(curve.state_numel == 2 * curve.local_numel for curve in curves)
        assert max(curve.local_numel for curve in curves) <= 1.1 * whole.local_numel / layout.world_size
