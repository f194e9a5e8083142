"""Every stage of post-training under every axis, with every tuning: the losses of one process."""

from __future__ import annotations

from functools import cache, partial

import pytest
import torch
from cells import LAYOUTS
from harness import Case, Curve, make_steps, run_ranks, train

from fourfold.dataset.collate import CutPolicy, cut
from fourfold.losses.teacher import KdSettings
from fourfold.parallel.mesh import build_mesh, single
from fourfold.parallel.step import Step
from fourfold.training.rollouts import answer_values

STAGES = ("dpo", "kto", "grpo", "rm", "kd")
TUNINGS = ("full", "lora", "qlora")
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
_CPU = torch.device("cpu")


def _case(stage: str, tuning: str, number: int, layers: int = 2, pref_loss: str = "sigmoid") -> Case:
    return Case(
        family=("llama", "qwen3")[number % 2],
        tuning=tuning,
        packed=number % 3 > 0,
        stage=stage,
        pref_loss=pref_loss,  # type: ignore[arg-type]
        kd=_KD[number % 3],
        overrides=(*_SHAPE.items(), ("num_hidden_layers", layers)),
    )


def _cases(layers: int) -> list[Case]:
    """Every stage with every tuning, and every loss of stage dpo with one of them."""
    cases = [_case(stage, tuning, n, layers) for n, (stage, tuning) in enumerate(
        (stage, tuning) for stage in STAGES for tuning in TUNINGS
    )]  # fmt: skip
    kinds = ("hinge", "ipo", "kto_pair", "orpo", "simpo", "robust", "exo", "sppo")
    return cases + [_case("dpo", TUNINGS[n % 2], n, layers, kind) for n, kind in enumerate(kinds)]


@cache
def _alone(layers: int) -> dict[Case, Curve]:
    [found] = run_ranks(1, lambda: {case: train(case, single(_CPU)) for case in _cases(layers)})
    return found


def _under(layout: str, layers: int) -> dict[Case, Curve]:
    mesh = build_mesh(LAYOUTS[layout], _CPU)
    return {case: train(case, mesh) for case in _cases(layers)}


def _assert_same(curves: list[Curve], expected: Curve) -> None:
    """Three losses within 1e-5 (2e-5 of those above 1), metrics of the first step, and its gradients within 1e-5 of
    their largest: a loss of whole answers is steep in each token."""
    largest = max(float(grad.abs().max()) for grad in expected.gradients.values())
    seen: set[str] = set()
    for curve in curves:
        assert curve.losses[:3] == pytest.approx(expected.losses[:3], abs=1e-5, rel=2e-5)
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
    layers = 4 if layout.endswith("zbv") else 2
    found = run_ranks(LAYOUTS[layout].world_size, partial(_under, layout, layers))
    for case, expected in _alone(layers).items():
        _assert_same([curves[case] for curves in found], expected)


def _asked(layout: str | None) -> list[torch.Tensor]:
    """Log-probabilities of every target of the first step, and of the answers as a whole."""
    mesh = single(_CPU) if layout is None else build_mesh(LAYOUTS[layout], _CPU)
    found: list[torch.Tensor] = []

    def ask(step: Step, policy: CutPolicy) -> None:
        samples = make_steps(99, 24, "grpo")[0][mesh.dp_rank :: mesh.layout.dp]
        batches = step.fill(cut(samples, policy))
        values = step.token_logps(batches, reference=True, temperature=0.7)
        of_tokens = answer_values(samples, batches, values)
        found.extend(torch.tensor(each) for each in of_tokens)

    train(_case("grpo", "lora", 1), mesh, ask=ask)
    return found


@pytest.mark.parametrize("layout", ["zero3-2", "tp2", "pp2-1f1b", "cp2-allgather"])
def test_log_probabilities_of_tokens_when_asked_under_a_layout_are_those_of_one_process(layout: str) -> None:
    [expected] = run_ranks(1, partial(_asked, None))
    dp = LAYOUTS[layout].dp
    for rank, found in enumerate(run_ranks(LAYOUTS[layout].world_size, partial(_asked, layout))):
        own = expected[rank % dp :: dp] if dp > 1 else expected
        assert len(found) == len(own)
        for values, whole in zip(found, own, strict=True):
            torch.testing.assert_close(values, whole, atol=1e-5, rtol=1e-5)
