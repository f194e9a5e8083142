"""Families that differ from the well-tried ones in a few things train under every axis as in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from harness import Case, Curve, assert_same, assert_together_same, run_ranks, train

from fourfold.parallel.mesh import Mesh, build_mesh, single
from fourfold.planning.layout import Layout
from fourfold.planning.read_shape import read_shape
from tiny_models import FURTHER_EXPERTS, FURTHER_FAMILIES, tiny_config

_CPU = torch.device("cpu")
_MILD = (("initializer_range", 0.1),)
"""Weights that magnify rounding less than the usual ones of the tests do."""
_LAYOUTS = {
    "ddp2": Layout(dp_replicate=2),
    "fsdp2": Layout(dp_shard=2),
    "pp2": Layout(pp=2),
    "cp2": Layout(cp=2),
    "ep2": Layout(dp_shard=2, ep=2),
}


def _names(layout: str) -> list[str]:
    """Families that have what an axis splits, and are not refused by it."""
    names = FURTHER_EXPERTS if layout == "ep2" else FURTHER_FAMILIES
    axis = layout[:-1]
    return [name for name in names if axis not in dict(read_shape(tiny_config(name)).refused)]


def _curves(mesh_of: Callable[[], Mesh], names: Sequence[str]) -> dict[str, Curve]:
    mesh = mesh_of()
    return {name: train(Case(family=name, overrides=_MILD), mesh) for name in names}


@pytest.fixture(scope="module")
def references() -> dict[str, Curve]:
    """The curves of one process."""
    [found] = run_ranks(1, lambda: _curves(lambda: single(_CPU), tuple(FURTHER_FAMILIES)))
    return found


@pytest.mark.parametrize("layout", sorted(_LAYOUTS))
def test_training_when_split_equals_one_process_for_every_further_family(
    layout: str, references: dict[str, Curve]
) -> None:
    names = _names(layout)
    assert len(names) > len(FURTHER_FAMILIES if layout != "ep2" else FURTHER_EXPERTS) - 5
    ranks = run_ranks(2, lambda: _curves(lambda: build_mesh(_LAYOUTS[layout], _CPU), names))
    for name in names:
        loss = 5e-5 if name in FURTHER_EXPERTS else 1e-5
        if layout == "pp2":
            assert_together_same([found[name] for found in ranks], references[name], loss=loss)
        else:
            for found in ranks:
                assert_same(found[name], references[name], loss=loss)
