"""Of a layout, a layer sees what `Layout.of_a_layer` leaves: what is reckoned of it is the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product

import pytest

from fourfold.planning.activations import kept
from fourfold.planning.axes import check_layout
from fourfold.planning.candidates import facts_of
from fourfold.planning.job import Job
from fourfold.planning.layout import Layout
from fourfold.planning.shape import ModelShape
from fourfold.planning.states import layer_part, outer_part

ShapeOf = Callable[[str], ModelShape]


def _layouts(shape: ModelShape) -> Iterator[Layout]:
    for replicas, shards, cp, tp, pp, ep in product((1, 2), (1, 4), (1, 2), (1, 2), (1, 4), (1, 4)):
        layout = Layout(replicas, shards, cp, tp, pp, ep)
        if check_layout(layout, facts_of(shape)):
            continue
        yield layout
        yield replace(layout, zero=1, reshard=False, loss_parallel=False, pp_microbatches=12, cp_method="ulysses")
        yield replace(layout, sequence_parallel=False, pp_schedule="interleaved_1f1b", pp_overlap_p2p=False)
        yield replace(layout, offload="optimizer", pp_schedule="zbv", cp_shards=cp > 1)


@pytest.mark.parametrize("name", ["Llama-3-8B", "Qwen3-30B-A3B"])
@pytest.mark.parametrize("job", [Job(tuning="full"), Job(bits=4), Job(compute="bf16", engine="compiled")])
def test_layers_when_only_what_they_see_is_known_are_reckoned_the_same(name: str, job: Job, shape_of: ShapeOf) -> None:
    shape = shape_of(name)
    layouts = list(_layouts(shape))
    for layout in layouts:
        least = layout.of_a_layer()
        for trained in (False, True):
            assert layer_part(shape, job, layout, 0, trained=trained) == layer_part(
                shape, job, least, 0, trained=trained
            )
            assert kept(shape, job, layout, 0, trained=trained) == kept(shape, job, least, 0, trained=trained)
        for ends in ({"is_first": True, "is_last": False}, {"is_first": True, "is_last": True}):
            assert outer_part(shape, job, layout, **ends) == outer_part(shape, job, least, **ends)
    assert len({layout.of_a_layer() for layout in layouts}) < 0.7 * len(layouts)
