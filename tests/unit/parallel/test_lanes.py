"""Edges of a ring of ranks that touch have groups of their own."""

from __future__ import annotations

import pytest

from fourfold.parallel.lanes import colour_of


@pytest.mark.parametrize("ranks", range(2, 10))
def test_edges_when_they_share_a_rank_have_different_colours(ranks: int) -> None:
    colours = [colour_of(source, ranks) for source in range(ranks)]
    assert all(colours[source] != colours[source - 1] for source in range(ranks))  # what a rank sends, and receives
    assert max(colours) <= (2 if ranks % 2 else 1)
