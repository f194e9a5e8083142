"""Sends and receives between pipeline stages on process groups of their own, so that none waits behind another.

A group has one stream for all of its messages. A rank that asks for the activations of the stage before it, and then
sends its own to the next, sends them only once those have come, though its neighbour may need them to go on; where
every rank has several stages, that costs what interleaving them saves (benchmarks/schedule_order.py).

Here an edge of the ring of ranks has a group for each direction, shared with edges that do not touch it: what a rank
receives and what it sends in one direction are then never in one group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from fourfold.parallel.mesh import Mesh
from fourfold.planning.stages import pipelines

Way = Literal["forward", "backward"]


@dataclass(frozen=True, slots=True)
class Lanes:
    """The groups, all of the ranks of one pipeline.

    Attributes:
        ranks: of the pipeline.
        forward, backward: groups by colour of an edge.
    """

    ranks: int
    forward: tuple[dist.ProcessGroup, ...]
    backward: tuple[dist.ProcessGroup, ...]

    def of(self, way: Way, source: int) -> dist.ProcessGroup:
        """The group of an edge.

        Args:
            source: the place in the pipeline of the rank whose stage comes first, whichever way the message goes.
        """
        groups = self.forward if way == "forward" else self.backward
        return groups[colour_of(source, self.ranks)]


def colour_of(source: int, ranks: int) -> int:
    """The colour of the edge from one rank of a ring to the next: edges that share a rank have different ones."""
    return 2 if ranks % 2 and source == ranks - 1 else source % 2


def open_lanes(mesh: Mesh) -> Lanes:
    """Make the groups; every rank of the job must call.

    They are set up by all of their ranks at once, and each edge is used once: a group that is set up by its first
    message would hold its host until the other ranks come to theirs, which may be waiting for this one.
    """
    own = next(row for row in pipelines(mesh.layout) if mesh.rank in row)
    colours = range(3 if len(own) % 2 else 2)
    found = {way: tuple(_group(mesh) for _ in colours) for way in ("forward", "backward")}
    lanes = Lanes(len(own), **found)
    for way in ("forward", "backward"):
        for group in found[way]:
            dist.all_reduce(torch.zeros(1, device=mesh.device), group=group)
        for colour in colours:
            _greet(lanes, way, colour, own, mesh.device)
    return lanes


def _group(mesh: Mesh) -> dist.ProcessGroup:
    found = mesh.new_pipeline_group(range(mesh.layout.pp), at_once=True)
    assert found is not None, "every rank is in a pipeline"
    return found


def _greet(lanes: Lanes, way: Way, colour: int, own: list[int], device: torch.device) -> None:
    """Use each edge of a colour once, in its direction."""
    place, size = own.index(dist.get_rank()), len(own)
    for source in range(size):
        target = (source + 1) % size
        if colour_of(source, size) != colour or place not in (source, target):
            continue
        sender = source if way == "forward" else target
        other = own[target if place == source else source]
        action = dist.isend if place == sender else dist.irecv
        word: Tensor = torch.zeros(1, device=device)
        for work in dist.batch_isend_irecv([dist.P2POp(action, word, other, lanes.of(way, source))]):
            work.wait()
