"""Each layout of the grid once, covering pairs of family, tuning, packing and stage; `make grid` runs them all."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from cells import FAMILIES, LAYOUTS, PACKINGS, STAGES, TUNINGS, Cell, cover, difference
from harness import Case, Curve, run_ranks, train, under

from fourfold.parallel.mesh import single


@pytest.fixture(scope="module")
def references() -> dict[Case, Curve]:
    """The curves of one process."""
    torch.set_num_threads(1)
    cases = list(dict.fromkeys(cell.reference() for cell in cover()))
    [found] = run_ranks(1, lambda: {case: train(case, single(torch.device("cpu"))) for case in cases})
    return found


def test_cover_when_listed_has_every_pair() -> None:
    names = [FAMILIES, TUNINGS, PACKINGS, STAGES]
    seen = [(cell.family, cell.tuning, cell.packing, cell.stage) for cell in cover()]
    for a, b in combinations(range(4), 2):
        missing = {(x, y) for x in names[a] for y in names[b]} - {(one[a], one[b]) for one in seen}
        assert not missing
    assert {cell.layout for cell in cover()} == LAYOUTS.keys()


@pytest.mark.parametrize("cell", list(cover()), ids=lambda cell: "-".join(cell.as_dict().values()))
def test_training_when_split_equals_one_process(cell: Cell, references: dict[Case, Curve]) -> None:
    reference = references[cell.reference()]
    for curve in under(cell.case(), LAYOUTS[cell.layout]):
        assert difference(curve, reference).problem(cell.family, reference) is None
