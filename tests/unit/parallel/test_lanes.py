"""Edges of a ring of ranks that touch have groups of their own."""

from __future__ import annotations

import pytest

from fourfold.parallel.lanes import colour_of
from fourfold.planning.layout import Layout
from fourfold.planning.stages import pipelines


@pytest.mark.parametrize("ranks", range(2, 10))
def test_edges_when_they_share_a_rank_have_different_colours(ranks: int) -> None:
    colours = [colour_of(source, ranks) for source in range(ranks)]
    assert all(colours[source] != colours[source - 1] for source in range(ranks))  # what a rank sends, and receives
    assert max(colours) <= (2 if ranks % 2 else 1)


def test_pipelines_when_other_axes_split_the_job_are_the_rows_of_the_mesh() -> None:
    assert pipelines(Layout(pp=3)) == [[0, 1, 2]]
    assert pipelines(Layout(pp=2, dp_replicate=2)) == [[0, 2], [1, 3]]
    assert pipelines(Layout(pp=2, dp_shard=2, tp=2)) == [[0, 4], [1, 5], [2, 6], [3, 7]]
