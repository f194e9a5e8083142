"""Compiled decoder layers on several ranks: the losses of one process that compiles nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import torch._dynamo
from harness import Case, Curve, alone, assert_together_same, run_ranks, train, under
from torch import nn
from torch._dynamo.backends.registry import lookup_backend

from fourfold.models.compiled import compile_layers, recompute_compiled
from fourfold.models.forward import StepModel
from fourfold.models.router import find_routers
from fourfold.models.targets import decoder_blocks
from fourfold.models.unwrap import base_model
from fourfold.parallel.apply import Parallelized
from fourfold.parallel.mesh import build_mesh
from fourfold.parallel.stacked_experts import experts_and_adapters
from fourfold.planning.layout import Layout

pytestmark = pytest.mark.filterwarnings("default")  # as an error, what torch's compiler warns of would end it

LAYOUTS = {
    "ddp2": Layout(dp_replicate=2),
    "zero2-2": Layout(dp_shard=2, zero=2),
    "zero3-2": Layout(dp_shard=2, zero=3),
    "tp2": Layout(tp=2),
    "tp2-whole-positions": Layout(tp=2, sequence_parallel=False),
    "pp2": Layout(pp=2),
    "pp2-gpipe": Layout(pp=2, pp_schedule="gpipe"),
    "pp2-interleaved": Layout(pp=2, pp_schedule="interleaved_1f1b"),
    "ddp2xtp2": Layout(dp_replicate=2, tp=2),
    "fsdp2xtp2": Layout(dp_shard=2, tp=2),
    "fsdp2xpp2": Layout(dp_shard=2, pp=2),
    "tp2xpp2": Layout(tp=2, pp=2),
    "cp2": Layout(cp=2),
    "cp2-ring": Layout(cp=2, cp_method="ring"),
    "cp2-ulysses": Layout(cp=2, cp_method="ulysses"),
    "fsdp2xcp2": Layout(dp_shard=2, cp=2),
    "ep2": Layout(dp_shard=2, ep=2),
    "fsdp2xep2": Layout(dp_shard=4, ep=2),
    "hsdp2xep2": Layout(dp_replicate=2, dp_shard=2, ep=2),
    "ep2xtp2": Layout(dp_shard=2, ep=2, tp=2),
    "ep2xpp2": Layout(dp_shard=2, ep=2, pp=2),
}
CASES = {
    "llama-full": Case(packed=False),
    "llama-lora": Case(tuning="lora", packed=False),
    "llama-deep": Case(packed=False, overrides=(("num_hidden_layers", 4),)),  # one for each stage, interleaved
    "gemma3-full": Case(family="gemma3_text", packed=False),
    "qwen3-lora": Case(family="qwen3", tuning="lora", packed=False),
    "qwen3_moe-full": Case(family="qwen3_moe", packed=False),
    "qwen3_moe-lora": Case(family="qwen3_moe", tuning="lora", packed=False),
    "llama-dropping": Case(tuning="lora", packed=False, dropout=0.2),
    "deepseek_v3-full": Case(family="deepseek_v3", packed=False),
    "gpt_oss-lora": Case(family="gpt_oss", tuning="lora", packed=False),
}
HAVE_EXPERTS = {case for case in CASES if case.startswith(("qwen3_moe", "deepseek", "gpt_oss"))}


@pytest.fixture(scope="module")
def references() -> dict[str, Curve]:
    """The curves of one process."""
    torch.set_num_threads(1)
    return {name: alone(case) for name, case in CASES.items()}


IN_EVERY_RUN = {
    ("ddp2", "llama-full"),
    ("zero3-2", "llama-full"),
    ("tp2", "llama-lora"),
    ("cp2", "llama-lora"),
    ("ep2", "qwen3_moe-full"),
    ("ep2", "qwen3_moe-lora"),
    ("pp2", "llama-dropping"),
}


class Run(NamedTuple):
    """One rank's.

    Attributes:
        graphs: how many were compiled.
        frames: how many functions were traced for them.
        numbers: attributes of modules that are inputs of a graph.
    """

    curve: Curve
    graphs: int
    frames: int
    numbers: list[str]


def run_compiled(case: Case, layout: Layout, *, again: bool = False) -> list[Run]:
    """Every rank's run with compiled layers.

    Args:
        again: layers are computed again in the backward pass.
    """

    def work() -> Run:
        compiled: list[nn.Module] = []
        numbers: list[str] = []

        def noting(graph: torch.fx.GraphModule, inputs: list[Any], **options: Any) -> Any:
            values = [(node.name, node.meta["example_value"]) for node in graph.graph.find_nodes(op="placeholder")]
            numbers.extend(name for name, value in values if isinstance(value, torch.SymInt) and "modules" in name)
            return lookup_backend("aot_eager")(graph, inputs, **options)

        def compile_once(model: StepModel, split: Parallelized) -> None:
            if not compiled:
                inner = base_model(model.module)
                compiled.extend(decoder_blocks(inner)[1])
                around = [*experts_and_adapters(inner), *(find_routers(inner) if case.router else ())]
                compile_layers(compiled, around=around, in_context=layout.cp > 1, backend=noting)
                if again:
                    assert model.noise is not None
                    recompute_compiled(compiled, model.noise.remembered)
                model.module.train()

        counted = torch._dynamo.utils.counters
        graphs, frames = counted["stats"]["unique_graphs"], counted["frames"]["total"]
        curve = train(case, build_mesh(layout, torch.device("cpu")), before=compile_once)
        graphs, frames = counted["stats"]["unique_graphs"] - graphs, counted["frames"]["total"] - frames
        return Run(curve, graphs, frames, numbers)

    return run_ranks(layout.world_size, work)


@pytest.mark.parametrize(
    ("layout", "case", "again"),
    [
        pytest.param(
            layout, case, again, marks=() if (layout, case) in IN_EVERY_RUN and not again else pytest.mark.grid
        )
        for layout in sorted(LAYOUTS)
        for case in sorted(CASES)
        for again in (False, True)
        if (case == "llama-deep") == (layout == "pp2-interleaved")
        if LAYOUTS[layout].ep == 1 or case in HAVE_EXPERTS
    ],
)
def test_training_when_layers_are_compiled_equals_one_process(
    layout: str, case: str, again: bool, references: dict[str, Curve]
) -> None:
    runs = run_compiled(CASES[case], LAYOUTS[layout], again=again)
    assert_together_same([run.curve for run in runs], references[case])
    # for all layers and lengths together: the first layer's input has a gradient or not; gemma3 has two kinds of
    # layers; what lies around experts or attention is cut in two
    most = 8 if case == "gemma3-full" else 20 if case in HAVE_EXPERTS else 5
    most = 40 if LAYOUTS[layout].cp > 1 else most  # and rows are one or several, whose graphs differ
    assert all(1 <= run.graphs <= most for run in runs)
    assert not any(run.numbers for run in runs)  # a head's size is a constant, also of a layer cut by FSDP
    if LAYOUTS[layout].cp == 1:  # what wraps a layer's forward pass is not traced up to what it is compiled around
        assert all(run.frames <= run.graphs + 4 for run in runs)


@pytest.mark.parametrize("again", [False, pytest.param(True, marks=pytest.mark.grid)])
@pytest.mark.parametrize("layout", [Layout(dp_shard=2, ep=2), pytest.param(Layout(dp_shard=2), marks=pytest.mark.grid)])
def test_balance_of_experts_when_layers_are_compiled_around_routers_is_that_of_plain_ones(
    layout: Layout, again: bool
) -> None:
    case = Case("qwen3_moe", packed=False, router=0.1)  # one of a micro-batch, so the same layout is compared
    plain = under(case, layout)
    assert plain[0].losses != pytest.approx(under(replace(case, router=0.0), layout)[0].losses, abs=1e-2)
    for run, expected in zip(run_compiled(case, layout, again=again), plain, strict=True):
        assert run.curve.losses == pytest.approx(expected.losses, abs=1e-5)
        assert run.curve.norms == pytest.approx(expected.norms, rel=1e-4)
        torch.testing.assert_close(run.curve.gradients, expected.gradients, rtol=1e-4, atol=1e-6)
        assert 1 <= run.graphs <= 24
