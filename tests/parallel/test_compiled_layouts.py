"""Compiled decoder layers on several ranks: the losses of one process that compiles nothing."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
from harness import Case, Curve, alone, assert_together_same, run_ranks, train
from torch import nn

from fourfold.models.compiled import compile_layers, recompute_compiled
from fourfold.models.forward import StepModel
from fourfold.models.targets import decoder_blocks
from fourfold.models.unwrap import base_model
from fourfold.parallel.apply import Parallelized
from fourfold.parallel.mesh import build_mesh
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
}
CASES = {
    "llama-full": Case(packed=False),
    "llama-lora": Case(tuning="lora", packed=False),
    "llama-deep": Case(packed=False, overrides=(("num_hidden_layers", 4),)),  # one for each stage, interleaved
    "gemma3-full": Case(family="gemma3_text", packed=False),
    "qwen3-lora": Case(family="qwen3", tuning="lora", packed=False),
}


@pytest.fixture(scope="module")
def references() -> dict[str, Curve]:
    """The curves of one process."""
    torch.set_num_threads(1)
    return {name: alone(case) for name, case in CASES.items()}


IN_EVERY_RUN = {
    ("ddp2", "llama-full"),
    ("zero3-2", "llama-full"),
    ("tp2", "llama-lora"),
}


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
    ],
)
def test_training_when_layers_are_compiled_equals_one_process(
    layout: str, case: str, again: bool, references: dict[str, Curve]
) -> None:
    def work() -> tuple[Curve, int]:
        compiled: list[nn.Module] = []

        def compile_once(model: StepModel, split: Parallelized) -> None:
            if not compiled:
                compiled.extend(decoder_blocks(base_model(model.module))[1])
                compile_layers(compiled, backend="aot_eager")
                if again:
                    recompute_compiled(compiled)
                model.module.train()

        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        curve = train(CASES[case], build_mesh(LAYOUTS[layout], torch.device("cpu")), before=compile_once)
        return curve, torch._dynamo.utils.counters["stats"]["unique_graphs"] - before

    curves, graphs = zip(*run_ranks(LAYOUTS[layout].world_size, work), strict=True)
    assert_together_same(list(curves), references[case])
    # for all layers and lengths together: the first layer's input has a gradient or not; gemma3 has two kinds of layers
    assert all(1 <= number <= (8 if case == "gemma3-full" else 5) for number in graphs)
