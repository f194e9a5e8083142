"""Examples, samples and batches: the tokens of training, from one sequence to one micro-batch on a device.

Shape legend: B rows, S positions per row, D documents in the micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""Label of a position that is not trained (the convention of torch's cross entropy)."""


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenised sequence, possibly several documents packed into one.

    Attributes:
        input_ids: token ids.
        labels: for each position the token it is trained to be, or IGNORE_INDEX; not shifted, same length as
            `input_ids`. A label may differ from the input (templates with an efficient end-of-sequence).
        documents: lengths of the documents in order; they sum to `len(input_ids)`. A document never sees
            another, and positions restart with each.
        weights: loss weight of each label, or None for all ones.
        numbers: further numbers of each label, by name (advantages, log-probabilities of before).
    """

    input_ids: list[int]
    labels: list[int]
    documents: tuple[int, ...] = ()
    weights: list[float] | None = None
    numbers: Mapping[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.documents:
            object.__setattr__(self, "documents", (len(self.input_ids),))

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_targets(self) -> int:
        """How many positions are trained; the first of a document predicts nothing before it."""
        starts, position = set(), 0
        for length in self.documents:
            starts.add(position)
            position += length
        return sum(lab != IGNORE_INDEX and i not in starts for i, lab in enumerate(self.labels))


@dataclass(frozen=True, slots=True)
class Sample:
    """What counts as one in the batch size: a sequence, or a group that is never split.

    Attributes:
        sequences: by role, in a fixed order: {"": example} for pt and sft, {"chosen", "rejected"} for
            preference stages, {"response", "kl"} for KTO.
        index: position of the sample in the whole data set; with seed and step it keys the randomness.
        extras: per-sample numbers (KTO's tag, reference log-probabilities).
    """

    sequences: Mapping[str, Example]
    index: int
    extras: Mapping[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(len(example) for example in self.sequences.values())


_PINNED = 2**20
"""Bytes of what an objective puts beside a batch that are pinned to be copied; a teacher's states may be gigabytes."""


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device, without waiting for it: from memory that can be paged out a copy begins when all is done
    that the device was given before."""
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class Keys:
    """What the documents of a packed row see where it is not just themselves: a document may begin with positions of
    another one, whose keys it sees before its own.

    Not a dataclass: FSDP takes those apart among a module's arguments, and cannot put frozen ones together again.

    Attributes:
        index: [K] int64, the positions of the row whose keys the documents see, document after document.
        offsets: [D + 1] int32, where each document's keys start in it.
        lengths: number of keys of each document, on the host; its positions are the last of them.
        places: [2, S] int64, where each position is in `index`: among its own document's keys, and among those of the
            document that sees it as well, -1 where none does.
    """

    def __init__(self, index: Tensor, offsets: Tensor, lengths: tuple[int, ...], places: Tensor) -> None:
        self.index, self.offsets, self.lengths, self.places = index, offsets, lengths, places

    def to(self, device: torch.device) -> Keys:
        """The same on `device`."""
        index, offsets, places = (to_device(tensor, device) for tensor in (self.index, self.offsets, self.places))
        return Keys(index, offsets, self.lengths, places)


class Noise(NamedTuple):
    """What dropout and input noise are keyed by.

    Attributes:
        keys: [B, S] int32, one a position.
        lengths: [B, S] fp32, length of the document that a position is in, 1 for padding.
    """

    keys: Tensor
    lengths: Tensor

    def to(self, device: torch.device) -> Noise:
        """The same on `device`."""
        return Noise(to_device(self.keys, device), to_device(self.lengths, device))


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch: tensors of one forward pass.

    Packed batches have B = 1 and one row of documents; padded ones have one document a row, padded on the right.

    Attributes:
        input_ids: [B, S] int64.
        targets: [B, S] int64; the token that the position must predict (labels shifted left by one within
            each document), IGNORE_INDEX where none.
        weights: [B, S] float32; loss weight of each target, 0 where there is none.
        position_ids: [B, S] int64; restart at 0 with each document.
        document_ids: [B, S] int32; index of the document within the micro-batch, -1 for padding.
        cu_seqlens: [D + 1] int32 for packed batches: where each document starts; None for padded ones.
        lengths: length of each document, on the host.
        num_tokens: input tokens without padding.
        numbers: by name [B, S] fp32, numbers of each target, 0 where there is none.
        samples: for each document the index of its sample (see Sample.index) and its role's position.
        extras: further tensors: numbers of samples, for each document that of its sample [D] fp32, and what an
            objective adds.
        scored: [N] int64, flat positions with a target, as the host found them; what fills them up is the last
            position. None where the device is to look itself.
        keys: what documents see; None where it is themselves.
        longest: at least the length of the longest document, where `lengths` are not to be known; 0 otherwise.
        noise: what noise is keyed by, where it was made before `samples` were taken away; None otherwise.
        whole_rows: see `documents_of_rows`, where the batch is a part of the positions of longer rows (its counts are
            those of the whole); None otherwise.
    """

    input_ids: Tensor
    targets: Tensor
    weights: Tensor
    position_ids: Tensor
    document_ids: Tensor
    cu_seqlens: Tensor | None
    lengths: tuple[int, ...]
    num_tokens: int
    samples: tuple[tuple[int, int], ...] = ()
    numbers: Mapping[str, Tensor] = field(default_factory=dict)
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    scored: Tensor | None = None
    keys: Keys | None = None
    longest: int = 0
    noise: Noise | None = None
    whole_rows: tuple[tuple[int, ...], ...] | None = None

    @property
    def max_seqlen(self) -> int:
        """Length of the longest document, or somewhat more."""
        return self.longest or max(self.lengths)

    @property
    def is_packed(self) -> bool:
        """Whether all documents lie in one row."""
        return self.cu_seqlens is not None

    @property
    def num_targets(self) -> int:
        """Trained positions."""
        return int((self.targets != IGNORE_INDEX).sum())

    def documents_of_rows(self) -> tuple[tuple[int, ...], ...]:
        """For each row the lengths of its documents; the padding of a padded row counts as its last document."""
        if self.is_packed:
            return (self.lengths,)
        rows = (torch.unique_consecutive(row, return_counts=True)[1] for row in self.document_ids)
        return tuple(tuple(counts.tolist()) for counts in rows)

    def real_positions(self) -> Tensor:
        """[B, S] bool: what is neither padding nor a document that only fills a packed row up (those come last)."""
        num_real = sum(end <= self.num_tokens for end in accumulate(self.lengths))
        return (self.document_ids >= 0) & (self.document_ids < num_real)

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        return replace(
            self,
            input_ids=to_device(self.input_ids, device),
            targets=to_device(self.targets, device),
            weights=to_device(self.weights, device),
            position_ids=to_device(self.position_ids, device),
            document_ids=to_device(self.document_ids, device),
            cu_seqlens=None if self.cu_seqlens is None else to_device(self.cu_seqlens, device),
            numbers={name: to_device(tensor, device) for name, tensor in self.numbers.items()},
            extras=self.extras_on(device),
            scored=None if self.scored is None else to_device(self.scored, device),
            keys=None if self.keys is None else self.keys.to(device),
            noise=None if self.noise is None else self.noise.to(device),
        )

    def with_scored(self) -> Batch:
        """The same batch, which is on the host, with `scored`: a device would have to wait to be asked for it."""
        return replace(self, scored=torch.nonzero(self.targets.reshape(-1) != IGNORE_INDEX).squeeze(-1))

    def extras_on(self, device: torch.device) -> dict[str, Tensor]:
        """The further tensors on `device`; large ones are not pinned."""
        return {
            name: to_device(tensor, device) if tensor.nbytes <= _PINNED else tensor.to(device, non_blocking=True)
            for name, tensor in self.extras.items()
        }
