"""Every family trains under each axis that splits it as in one process; `test_tensor.py` has those of tp."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from harness import Case, Curve, assert_same, assert_together_same, run_ranks, train

from family_axes import axes_of, packs
from fourfold.parallel.mesh import Mesh, build_mesh, single
from fourfold.planning.layout import Layout
from tiny_models import EVERY_FAMILY, FURTHER_FAMILIES, OTHER_FAMILIES

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
    """Families that the axis splits; of those of data, which split all, the ones that have no other tests of it."""
    axis = layout[:-1]
    return (
        sorted(FURTHER_FAMILIES | OTHER_FAMILIES)
        if axis in ("ddp", "fsdp")
        else [n for n in EVERY_FAMILY if axis in axes_of(n)]
    )


def _curves(mesh_of: Callable[[], Mesh], names: Sequence[str]) -> dict[str, Curve]:
    mesh = mesh_of()
    return {name: train(Case(family=name, packed=packs(name), overrides=_MILD), mesh) for name in names}


@pytest.fixture(scope="module")
def references() -> dict[str, Curve]:
    """The curves of one process."""
    [found] = run_ranks(1, lambda: _curves(lambda: single(_CPU), tuple(EVERY_FAMILY)))
    return found


@pytest.mark.parametrize("layout", sorted(_LAYOUTS))
def test_training_when_split_equals_one_process_for_every_family_that_it_splits(
    layout: str, references: dict[str, Curve]
) -> None:
    names = _names(layout)
    assert len(names) > 20
    ranks = run_ranks(2, lambda: _curves(lambda: build_mesh(_LAYOUTS[layout], _CPU), names))
    for name in names:
        loss = 5e-5 if "ep" in axes_of(name) else 1e-5
        if layout == "pp2":
            assert_together_same([found[name] for found in ranks], references[name], loss=loss)
        else:
            for found in ranks:
                assert_same(found[name], references[name], loss=loss)
