"""Between the parts of a tensor that ranks hold and the whole that files hold.

A part is described by boxes: which rectangles of the whole lie on this rank, and where in its local tensor. There may
be several, since a fused matrix is cut in several ranges. Whatever cut a tensor - matrices, experts, FSDP, or one
inside the other - boxes tell all that gathering, saving and loading need to know.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fourfold.parallel.sharded import local
from fourfold.parallel.shares import Share, Shares

Sizes = tuple[int, ...]


class Box(NamedTuple):
    """A rectangle of a whole tensor.

    Attributes:
        offsets: where it begins in the whole.
        sizes: how far it goes.
        at: where it begins in the local tensor of the rank that holds it.
    """

    offsets: Sizes
    sizes: Sizes
    at: Sizes


class Source(Protocol):
    """Whole tensors by name, of which any rectangle can be read without the rest."""

    def __contains__(self, name: object) -> bool:
        """Whether there is such a tensor."""
        ...

    def shape(self, name: str) -> Sizes:
        """Of the whole tensor."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """Of the tensor."""
        ...

    def read_into(self, target: Tensor, name: str, offsets: Sizes) -> None:
        """Write the rectangle that begins at `offsets` and has the shape of `target` into `target`, cast to it."""
        ...


@dataclass(frozen=True, slots=True)
class Part:
    """What this rank holds of one tensor.

    Attributes:
        shape: of the whole.
        local: the tensor on this rank; writing to it changes the model.
        boxes: what of the whole it is; none if it is empty.
    """

    shape: Sizes
    local: Tensor
    boxes: tuple[Box, ...]

    def view(self, box: Box) -> Tensor:
        """One of the boxes, in the local tensor."""
        return _rectangle(self.local, box.at, box.sizes)

    def with_local(self, tensor: Tensor) -> Part:
        """The same part of another tensor that is cut alike, e.g. of an optimizer's state."""
        return Part(self.shape, local(tensor.detach()), self.boxes)

    @property
    def is_whole(self) -> bool:
        """Whether this rank holds everything."""
        return tuple(self.local.shape) == self.shape


def describe(tensor: Tensor, share: Share | None) -> Part:
    """What this rank holds of a parameter, a buffer or a gradient.

    Args:
        tensor: as the module holds it: plain, or sharded by FSDP.
        share: what of the whole the tensor is, before FSDP; None if all of it.
    """
    shape = tuple(tensor.shape) if share is None else share.shape
    start, size = (0,) * tensor.ndim, tuple(tensor.shape)
    if isinstance(tensor, DTensor):
        (chunk,) = tensor.__create_chunk_list__()  # the protocol by which torch's own checkpoints find shards
        start, size = tuple(chunk.offsets), tuple(chunk.sizes)
    cuts = {} if share is None else {cut.dim: cut.ranges for cut in share.cuts}
    spans = [
        _spans(cuts.get(dim, ((0, shape[dim]),)), begin, begin + length)
        for dim, (begin, length) in enumerate(zip(start, size, strict=True))
    ]
    boxes = tuple(Box(*zip(*spans, strict=True)) if spans else Box((), (), ()) for spans in itertools.product(*spans))
    return Part(shape, local(tensor.detach()), boxes)


def _spans(ranges: Sequence[tuple[int, int]], begin: int, end: int) -> list[tuple[int, int, int]]:
    """Where [begin, end) of a part made of `ranges` of the whole lies: (in the whole, length, in [begin, end))."""
    found, passed = [], 0
    for start, stop in ranges:
        low, high = max(begin, passed), min(end, passed + stop - start)
        if low < high:
            found.append((start + low - passed, high - low, low - begin))
        passed += stop - start
    return found


def parts_of(root: nn.Module, shares: Shares) -> dict[str, Part]:
    """Every entry of the module's state dict that is a tensor, as this rank holds it.

    A tied parameter has several names.
    """
    noted = shares.by_parameter(root)
    parts: dict[str, Part] = {}
    for name, tensor in root.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor):
            parts[name] = describe(tensor, noted.get(tensor) if isinstance(tensor, nn.Parameter) else None)
    return parts


@torch.no_grad()
def fill(part: Part, source: Source, name: str) -> None:
    """Read this rank's part of a tensor, and nothing else of it.

    Raises:
        ValueError: the tensor has another shape.
    """
    if source.shape(name) != part.shape:
        raise ValueError(f"{name} has the shape {list(source.shape(name))}, not {list(part.shape)}")
    for box in part.boxes:
        source.read_into(part.view(box), name, box.offsets)


class _Outline(NamedTuple):
    """A part without its numbers, as other ranks are told of it."""

    shape: Sizes
    dtype: torch.dtype
    boxes: tuple[Box, ...]


@torch.no_grad()
def gather(parts: Mapping[str, Part]) -> Iterator[tuple[str, Tensor | None]]:
    """Every tensor that any rank holds a part of, whole, on the host of rank 0, one at a time.

    All ranks must iterate to the end. They see the same names in the same order, also of what they hold nothing of.

    Returns:
        pairs of name and tensor on rank 0, and of name and None on the others.
    """
    outlines = everyone({name: _Outline(part.shape, part.local.dtype, part.boxes) for name, part in parts.items()})
    rank = dist.get_rank() if len(outlines) > 1 else 0
    for name in dict.fromkeys(itertools.chain.from_iterable(outlines)):
        held = {holder: outline[name] for holder, outline in enumerate(outlines) if name in outline}
        yield name, _gather_one(name, parts.get(name), held, rank)


def _gather_one(name: str, part: Part | None, held: Mapping[int, _Outline], rank: int) -> Tensor | None:
    givers = _givers(held)
    if rank != 0:
        if rank in givers:
            assert part is not None
            dist.send(torch.cat([part.view(box).reshape(-1) for box in givers[rank]]).cpu(), 0)
        return None
    if part is not None and part.is_whole and part.boxes:
        return part.local.cpu()
    outline = next(iter(held.values()))
    whole = torch.empty(outline.shape, dtype=outline.dtype)
    filled = 0
    for giver, boxes in givers.items():
        numel = sum(math.prod(box.sizes) for box in boxes)
        if giver == 0:
            assert part is not None
            flat = torch.cat([part.view(box).reshape(-1) for box in boxes]).cpu()
        else:
            flat = torch.empty(numel, dtype=outline.dtype)
            dist.recv(flat, giver)
        pieces = flat.split([math.prod(box.sizes) for box in boxes])
        for box, piece in zip(boxes, pieces, strict=True):
            _rectangle(whole, box.offsets, box.sizes).copy_(piece.view(box.sizes))
        filled += numel
    assert filled == whole.numel(), f"{name}: the ranks hold {filled} of {whole.numel()} entries"
    return whole


def _givers(held: Mapping[int, _Outline]) -> dict[int, list[Box]]:
    """Who gives which boxes: the first of the ranks that hold the same."""
    givers: dict[int, list[Box]] = {}
    seen: set[tuple[Sizes, Sizes]] = set()
    for rank, outline in held.items():
        for box in outline.boxes:
            if (box.offsets, box.sizes) not in seen:
                seen.add((box.offsets, box.sizes))
                givers.setdefault(rank, []).append(box)
    return givers


def everyone(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """What each rank gave, in the order of ranks; every rank must call.

    Args:
        group: of all ranks, where the usual one is in use by another thread.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def _rectangle(tensor: Tensor, offsets: Sizes, sizes: Sizes) -> Tensor:
    for dim, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
        tensor = tensor.narrow(dim, offset, size)
    return tensor
