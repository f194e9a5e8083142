"""A model cut into pipeline stages trains and evaluates as one process does, and each rank holds its stages only."""

from __future__ import annotations

import time
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from cells import LAYOUTS, Cell
from harness import Case, alone, assert_together_same, run_ranks, train, under

from fourfold.base.errors import PlanError
from fourfold.models.unwrap import base_model
from fourfold.parallel.launch import Machines, WorkerError, launch
from fourfold.parallel.mesh import build_mesh, start_process_group
from fourfold.parallel.pipeline import _Stage
from fourfold.parallel.stages import cut_stages
from fourfold.planning.layout import Layout
from tiny_models import tiny_model

_CPU = torch.device("cpu")
_FOUR = (("num_hidden_layers", 4),)
_SIX = (("num_hidden_layers", 6),)
_EIGHT = (("num_hidden_layers", 8),)


def _pp(size: int, schedule: Any = "1f1b", **sizes: Any) -> Layout:
    return Layout(pp=size, pp_schedule=schedule, **sizes)


CASES = {
    "gpipe": (Case(overrides=_FOUR), _pp(2, "gpipe")),
    "1f1b-more-micro-batches": (Case(overrides=_FOUR), _pp(2, pp_microbatches=5)),
    "interleaved-gemma": (
        Cell("pp2-interleaved_1f1b", "gemma3_text", "full", "padded", "sft").case(),
        LAYOUTS["pp2-interleaved_1f1b"],
    ),
    "zbv-tied": (Case("qwen3", overrides=_FOUR), _pp(2, "zbv")),
    "interleaved": (Case(overrides=_FOUR), _pp(2, "interleaved_1f1b")),
    "interleaved-3": (Case("qwen3", overrides=_SIX), _pp(3, "interleaved_1f1b")),
    "interleaved-replicas": (Case(tuning="lora", overrides=_FOUR), _pp(2, "interleaved_1f1b", dp_replicate=2)),
    "interleaved-4": (Case(overrides=_EIGHT), _pp(4, "interleaved_1f1b")),
    "interleaved-one-group": (Case(overrides=_FOUR), _pp(2, "interleaved_1f1b", pp_overlap_p2p=False)),
    "scaled-embeddings": (Case("granite"), _pp(2)),
    "replicas": (Case("qwen3"), _pp(2, dp_replicate=2)),
    "shared-positions-between-two-stages": (
        Cell("pp2-interleaved_1f1b", "llama", "full", "packed", "sft").case(),
        _pp(2, "interleaved_1f1b", tp=2),
    ),
    "recompute-zbv-dropout": (Case(overrides=_FOUR, tuning="lora", recompute="full", dropout=0.1), _pp(2, "zbv")),
    "1f1b-4": (Case("qwen3", overrides=_EIGHT), _pp(4)),
    "zbv-4": (Case(tuning="lora", overrides=_EIGHT), _pp(4, "zbv")),
}
_IN_THE_GRID = {"gpipe", "1f1b-4"}  # one cell of each runs in test_grid_cover


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.grid if name in _IN_THE_GRID else ()) for name in CASES]
)
def test_training_when_in_stages_equals_one_process(name: str) -> None:
    case, layout = CASES[name]
    torch.set_num_threads(1)
    assert_together_same(under(case, layout), alone(case))


@pytest.mark.parametrize(("ranks", "case"), [(2, Case(overrides=_FOUR)), (3, Case(overrides=_SIX))])
def test_messages_when_groups_are_apart_are_sent_by_others_than_they_are_received(ranks: int, case: Case) -> None:
    def work() -> dict[tuple[str, bool], set[int]]:
        used: dict[tuple[str, bool], set[int]] = {}
        by_lane = _Stage._by_lane

        def noted(self: _Stage, ops: list[dist.P2POp], way: Any, source: int) -> list[dist.P2POp]:
            for op in (found := by_lane(self, ops, way, source)):
                used.setdefault((way, op.op is dist.isend), set()).add(id(op.group))
            return found

        with mock.patch.object(_Stage, "_by_lane", noted):
            train(case, build_mesh(_pp(ranks, "interleaved_1f1b"), _CPU))
        return used

    for used in run_ranks(ranks, work):
        assert len(used) == 4  # both ways, sent and received
        assert sum(map(len, used.values())) == len(set.union(*used.values())) == 4


def test_bytes_when_uneven_stages_are_asked_for_are_theirs() -> None:
    """Tied, so that first and last stage both hold the embedding, which counts once in the norm."""
    case = Case("qwen3", overrides=_FOUR)
    whole = alone(case)
    first, last = under(case, _pp(2, pp_layers=(1, 3)))
    assert_together_same([first, last], whole)
    model = tiny_model("qwen3", num_hidden_layers=4)
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    embedding, norm = model.model.embed_tokens.weight.numel(), model.model.norm.weight.numel()
    assert first.local_numel == embedding + layer
    assert last.local_numel == embedding + 3 * layer + norm
    assert (first.state_numel, last.state_numel) == (2 * first.local_numel, 2 * last.local_numel)


def _refusal(spoil: Any) -> list[str]:
    model = tiny_model()
    spoil(model)
    try:
        cut_stages(base_model(model), build_mesh(_pp(2), _CPU), None)
    except PlanError as error:
        return [str(error)]
    return []


def _scale_again(model: Any) -> None:
    """As a family would whose forward pass scales under a name that is not known."""
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "inputs_embeds": kwargs["inputs_embeds"] * 2}), with_kwargs=True
    )


def _add_weights(model: Any) -> None:
    model.model.extra = torch.nn.Linear(2, 2)


def _drop_plan(model: Any) -> None:
    model.config.base_model_pp_plan = None


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_scale_again, "changes hidden states outside its layers"),
        (_add_weights, r"has weights outside embedding, layers, norm and head (model.extra.weight)"),
        (_drop_plan, "llama models are not known to be cut into stages"),
    ],
)
def test_cut_when_a_stage_would_not_be_exact_is_refused(spoil: Any, message: str) -> None:
    for [found] in run_ranks(2, partial(_refusal, spoil)):
        assert message in found


def _break_last_stage() -> None:
    start_process_group(_CPU, 120)
    from harness import train

    mesh = build_mesh(_pp(2), _CPU)
    if mesh.rank == 1:
        torch.nn.functional.cross_entropy = _raise  # type: ignore[assignment] - in this process alone
    train(Case(), mesh)


def _raise(*args: Any, **kwargs: Any) -> None:
    raise ValueError("the last stage is broken")


def test_launch_when_a_stage_fails_shows_its_error_and_ends_the_others() -> None:
    started = time.monotonic()
    torch.set_num_threads(1)
    with pytest.raises(WorkerError, match="the last stage is broken"):
        launch(_break_last_stage, Machines(per_node=2), fresh=False)
    assert time.monotonic() - started < 30
