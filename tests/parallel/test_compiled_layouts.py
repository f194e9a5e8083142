"""Compiled decoder layers under data parallelism: the losses of one process that compiles nothing."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
from harness import Case, Curve, alone, assert_same, run_ranks, train
from torch import nn

from fourfold.models.compiled import compile_layers
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
}
CASES = {
    "llama-full": Case(packed=False),
    "qwen3-lora": Case(family="qwen3", tuning="lora", packed=False),
}


@pytest.fixture(scope="module")
def references() -> dict[str, Curve]:
    """The curves of one process."""
    torch.set_num_threads(1)
    return {name: alone(case) for name, case in CASES.items()}


IN_EVERY_RUN = {("ddp2", "llama-full"), ("zero3-2", "qwen3-lora")}


@pytest.mark.parametrize(
    ("layout", "case"),
    [
        pytest.param(layout, case, marks=() if (layout, case) in IN_EVERY_RUN else pytest.mark.grid)
        for layout in sorted(LAYOUTS)
        for case in sorted(CASES)
    ],
)
def test_training_when_layers_are_compiled_equals_one_process(
    layout: str, case: str, references: dict[str, Curve]
) -> None:
    def work() -> tuple[Curve, int]:
        compiled: list[nn.Module] = []

        def compile_once(model: StepModel, split: Parallelized) -> None:
            if not compiled:
                compiled.extend(decoder_blocks(base_model(model.module))[1])
                compile_layers(compiled, backend="aot_eager")
                model.module.train()

        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        curve = train(CASES[case], build_mesh(LAYOUTS[layout], torch.device("cpu")), before=compile_once)
        return curve, torch._dynamo.utils.counters["stats"]["unique_graphs"] - before

    for curve, graphs in run_ranks(2, work):
        assert_same(curve, references[case])
        assert 1 <= graphs <= 4  # for all layers and lengths together: the first layer's input has a gradient or not
