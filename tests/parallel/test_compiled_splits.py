"""A model as it is built to run compiled, in bf16, on ranks that have parts of its layers: the losses of one process
that compiles nothing, and weights like those of the same ranks without."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
import torch._dynamo
from harness import run_ranks

from compiled_building import build_as_on_a_gpu, train_built
from fourfold.parallel.mesh import build_mesh, single
from fourfold.parallel.recompute import Recompute
from fourfold.planning.layout import Layout
from fourfold.training.fast import NOTHING_FAST, Fast
from tiny_models import tiny_model

pytestmark = pytest.mark.filterwarnings("default")  # as an error, what torch's compiler warns of would end it

_CPU = torch.device("cpu")
_LAYOUTS = {
    "tp2": Layout(tp=2),
    "tp2-whole-positions": Layout(tp=2, sequence_parallel=False),
    "pp2": Layout(pp=2),
    "pp2-interleaved": Layout(pp=2, pp_schedule="interleaved_1f1b"),
    "tp2xpp2": Layout(tp=2, pp=2),
    "ddp2xtp2": Layout(dp_replicate=2, tp=2),
    "ddp2xpp2": Layout(dp_replicate=2, pp=2),
}
_TUNINGS: dict[str, dict[str, Any]] = {
    "full": {"finetuning_type": "full"},
    "lora": {"finetuning_type": "lora", "lora_rank": 4},
}
_IN_EVERY_RUN = {("tp2", "full", "none"), ("pp2", "lora", "full")}

Found = tuple[list[float], dict[str, torch.Tensor], int, int]


def _train(
    folder: Path, layout: Layout, wishes: Fast, keys: dict[str, Any], recompute: Recompute = "none"
) -> list[Found]:
    """Of each rank, losses and weights, how many layers are joined, and how many graphs were compiled."""

    def work() -> Found:
        mesh = build_mesh(layout, _CPU) if layout.world_size > 1 else single(_CPU)
        built = build_as_on_a_gpu(folder, wishes, mesh, **keys)
        assert built.recompute(recompute) == recompute
        groups = {id(layer.siblings[1]) for layer in built.module.modules() if getattr(layer, "siblings", None)}
        losses, weights = train_built(built)
        return losses, weights, len(groups), torch._dynamo.utils.counters["stats"]["unique_graphs"]

    return run_ranks(layout.world_size, work)


@pytest.mark.parametrize(
    ("layout", "tuning", "recompute"),
    [
        pytest.param(*cell, marks=() if cell in _IN_EVERY_RUN else pytest.mark.grid)
        for cell in product(_LAYOUTS, _TUNINGS, ("none", "full"))
    ],
)
def test_training_when_built_to_run_compiled_on_parts_is_that_of_layers_as_they_are(
    layout: str, tuning: str, recompute: Recompute, tmp_path: Path
) -> None:
    keys = _TUNINGS[tuning]
    tiny_model("llama", num_hidden_layers=4, initializer_range=0.1).save_pretrained(tmp_path)
    ((whole, *_),) = _train(tmp_path, Layout(), NOTHING_FAST, keys)
    plain = _train(tmp_path, _LAYOUTS[layout], NOTHING_FAST, keys)
    found = _train(tmp_path, _LAYOUTS[layout], Fast(compiled=True), keys, recompute)
    for (losses, weights, groups, graphs), (_, before, none, no_graphs) in zip(found, plain, strict=True):
        assert (none, no_graphs) == (0, 0)
        assert graphs > 0
        assert groups == 2 * 4 / _LAYOUTS[layout].pp  # of a layer: queries, keys and values; gate and up
        assert mean(abs(a - b) for a, b in zip(losses, whole, strict=True)) <= 2e-3
        assert weights.keys() == before.keys()
        apart = torch.cat([(weight - before[name]).flatten() for name, weight in weights.items()])
        assert float(apart.abs().mean()) <= 1e-4
