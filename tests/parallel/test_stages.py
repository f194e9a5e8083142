"""Every stage of post-training under every axis, with every tuning: the losses of one process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import combinations, product

import pytest
import torch
from cells import LAYOUTS
from harness import Case, Curve, make_steps, run_ranks, train

from fourfold.dataset.collate import CutPolicy
from fourfold.losses.teacher import KdSettings
from fourfold.parallel.mesh import build_mesh, single
from fourfold.parallel.step import Step
from fourfold.planning.layout import Layout
from fourfold.training.rollouts import logps_of_answers, values_of_answers

STAGES = ("dpo", "kto", "grpo", "rm", "kd")
TUNINGS = ("full", "lora", "qlora")
FAMILIES = ("llama", "qwen3")
_GRID = pytest.mark.grid
_LAYOUTS = (
    *("ddp2", "zero3-2", "tp2", "pp2-1f1b", "fsdp2xtp2"),
    *(pytest.param(name, marks=_GRID) for name in ("pp2-zbv", "cp2-allgather", "fsdp2xpp2", "tp2xpp2")),
)
_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "initializer_range": 0.04,
}
_KD = (
    KdSettings("forward_kl", temperature=2.0, alpha=0.7),
    KdSettings("reverse_kl", alpha=1.0),
    KdSettings("jsd", beta=0.3, alpha=0.5),
)
_STEPS = (0, 1, 4)
"""Two of many samples and the one of a single one: the two that are left out would say nothing else."""
_CPU = torch.device("cpu")


def _case(stage: str, tuning: str, number: int, layers: int = 2, pref_loss: str = "sigmoid") -> Case:
    return Case(
        family=FAMILIES[number % 2],
        tuning=tuning,
        packed=number % 3 > 0,
        stage=stage,
        pref_loss=pref_loss,  # type: ignore[arg-type]
        kd=_KD[number % 3],
        overrides=(*_SHAPE.items(), ("num_hidden_layers", layers)),
        steps=_STEPS,
    )


def _layers(layout: str) -> int:
    return 4 if layout.endswith("zbv") else 2


def _cases(layers: int) -> list[Case]:
    """Every stage with every tuning, and every loss of stage dpo with one of them."""
    cases = [_case(stage, tuning, n, layers) for n, (stage, tuning) in enumerate(
        (stage, tuning) for stage in STAGES for tuning in TUNINGS
    )]  # fmt: skip
    kinds = ("hinge", "ipo", "kto_pair", "orpo", "simpo", "robust", "exo", "sppo")
    return cases + [_case("dpo", TUNINGS[n % 2], n, layers, kind) for n, kind in enumerate(kinds)]


@cache
def _alone(cases: tuple[Case, ...]) -> dict[Case, Curve]:
    [found] = run_ranks(1, lambda: {case: train(case, single(_CPU)) for case in cases})
    return found


def _under(layout: Layout, cases: Sequence[Case]) -> dict[Case, Curve]:
    mesh = build_mesh(layout, _CPU)
    return {case: train(case, mesh) for case in cases}


def _assert_same(curves: list[Curve], expected: Curve) -> None:
    """Three losses within 1e-5 (2e-5 of those above 1), metrics of the first step, and its gradients within 1e-5 of
    their largest: a loss of whole answers is steep in each token."""
    largest = max(float(grad.abs().max()) for grad in expected.gradients.values())
    seen: set[str] = set()
    for curve in curves:
        assert curve.losses == pytest.approx(expected.losses, abs=1e-5, rel=2e-5)
        assert curve.metrics.keys() == expected.metrics.keys()
        assert curve.metrics == pytest.approx(expected.metrics, abs=1e-4, rel=1e-5)
        for name, grad in curve.gradients.items():
            whole = expected.gradients[name]
            part = curve.shares[name].take(whole) if name in curve.shares else whole
            assert float((part - grad).abs().max()) <= 1e-5 * largest, name
            seen.add(name)
    assert seen == expected.gradients.keys()


@pytest.mark.parametrize("layout", _LAYOUTS)
def test_losses_when_a_stage_runs_under_a_layout_are_those_of_one_process(layout: str) -> None:
    cases = tuple(_cases(_layers(layout)))
    found = run_ranks(LAYOUTS[layout].world_size, partial(_under, LAYOUTS[layout], cases))
    for case, expected in _alone(cases).items():
        _assert_same([curves[case] for curves in found], expected)


_PPO_LAYOUTS = ("one", "ddp2", "zero3-2", "tp2", "pp2-1f1b", "fsdp2xtp2")
_MORE_PPO_LAYOUTS = ("pp2-zbv", "cp2-allgather", "fsdp2xpp2", "tp2xpp2")


def _ppo_case(family: str, tuning: str, packed: bool, layout: str) -> Case:
    overrides = (*_SHAPE.items(), ("num_hidden_layers", _layers(layout)))
    return Case(family=family, tuning=tuning, packed=packed, stage="ppo", overrides=overrides, steps=_STEPS)


def _ppo_cover(layout: str) -> list[Case]:
    """Every tuning; over all layouts every pair of layout, tuning, family and packing."""
    first = len(TUNINGS) * _PPO_LAYOUTS.index(layout)
    places = enumerate(TUNINGS, start=first)
    return [_ppo_case(FAMILIES[n // 2 % 2], tuning, n % 2 > 0, layout) for n, tuning in places]


def _ppo_rest(layout: str) -> list[Case]:
    """What the cover leaves out."""
    everything = [_ppo_case(*names, layout) for names in product(FAMILIES, TUNINGS, (True, False))]
    covered = _ppo_cover(layout) if layout in _PPO_LAYOUTS else []
    return [case for case in everything if case not in covered]


def test_ppo_cover_when_listed_has_every_pair() -> None:
    names = [_PPO_LAYOUTS, FAMILIES, TUNINGS, (True, False)]
    seen = [(layout, c.family, c.tuning, c.packed) for layout in _PPO_LAYOUTS for c in _ppo_cover(layout)]
    for a, b in combinations(range(4), 2):
        assert {(one[a], one[b]) for one in seen} == set(product(names[a], names[b]))


@pytest.mark.parametrize(
    ("layout", "cases"),
    [
        *(pytest.param(name, _ppo_cover(name), id=name) for name in _PPO_LAYOUTS),
        *(
            pytest.param(name, _ppo_rest(name), id=f"{name}-rest", marks=_GRID)
            for name in (*_PPO_LAYOUTS, *_MORE_PPO_LAYOUTS)
        ),
    ],
)
def test_ppo_when_given_the_same_rollouts_under_a_layout_has_the_losses_of_one_process(
    layout: str, cases: list[Case]
) -> None:
    """Compared with padded rows."""
    references = _alone(tuple(_ppo_case(*names, False, layout) for names in product(FAMILIES, TUNINGS)))
    plan = LAYOUTS.get(layout, Layout())
    found = run_ranks(plan.world_size, partial(_under, plan, cases))
    for case in cases:
        expected = references[replace(case, packed=False)]
        assert 0 < expected.metrics["clip_fraction"] < 1
        assert 0 < expected.metrics["value_clip_fraction"] < 1
        _assert_same([curves[case] for curves in found], expected)


def _asked(layout: str | None) -> list[torch.Tensor]:
    """Of every answer of the first step the log-probabilities of its tokens under the reference, and their values."""
    mesh = single(_CPU) if layout is None else build_mesh(LAYOUTS[layout], _CPU)
    found: list[torch.Tensor] = []

    def ask(step: Step, policy: CutPolicy) -> None:
        samples = make_steps(99, 24, "ppo")[0][mesh.dp_rank :: mesh.layout.dp]
        logps = logps_of_answers(step, samples, policy, reference=True, temperature=0.7)
        values = values_of_answers(step, samples, policy)
        found.extend(torch.tensor(each) for each in zip(logps, values, strict=True))

    train(replace(_case("ppo", "lora", 1), steps=()), mesh, ask=ask)
    return found


@pytest.mark.parametrize("layout", ["zero3-2", "tp2", "pp2-1f1b", "cp2-allgather"])
def test_log_probabilities_and_values_of_tokens_when_asked_under_a_layout_are_those_of_one_process(layout: str) -> None:
    [expected] = run_ranks(1, partial(_asked, None))
    dp = LAYOUTS[layout].dp
    for rank, found in enumerate(run_ranks(LAYOUTS[layout].world_size, partial(_asked, layout))):
        own = expected[rank % dp :: dp] if dp > 1 else expected
        assert len(found) == len(own)
        for values, whole in zip(found, own, strict=True):
            torch.testing.assert_close(values, whole, atol=1e-5, rtol=1e-5)
