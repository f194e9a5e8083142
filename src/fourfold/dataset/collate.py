"""From the samples of one optimizer step to its micro-batches.

Which samples make up a step is fixed by the config; how they are cut into micro-batches is free: sums with global
denominators (parallel/terms.py) make the loss independent of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F

from fourfold.dataset.batch import IGNORE_INDEX, Batch, Example, Keys, Noise, Sample


@dataclass(frozen=True, slots=True)
class CutPolicy:
    """How a step is cut into micro-batches.

    Attributes:
        packed: lay the documents of a micro-batch end to end in one row (the attention must keep them apart);
            otherwise one example a row, padded on the right.
        max_tokens: positions of a micro-batch, padding included; a single longer sample still makes one.
        max_samples: samples of a micro-batch; None for no limit but `max_tokens`.
        apart: a padded row has one document alone, though its example has several; for models that would have them see
            each other.
        pad_token_id: fills padded positions.
        multiple: the positions of a row are made a multiple of this, so that ranks can share them evenly.
        min_batches: micro-batches of a step, where it has as many samples; a pipeline needs several to be busy.
        shares_prompts: tokens from which on what both sequences of a packed sample begin with is laid down once; 0 for
            never.
    """

    packed: bool
    max_tokens: int
    max_samples: int | None = None
    pad_token_id: int = 0
    apart: bool = False
    multiple: int = 1
    min_batches: int = 1
    shares_prompts: int = 0


@dataclass(frozen=True, slots=True)
class _Document:
    """One document of an example: its tokens, next-token targets, their weights and numbers, all of the same length.

    Attributes:
        before: tokens that come before these and lie at the start of the document before.
    """

    input_ids: list[int]
    targets: list[int]
    weights: list[float]
    numbers: Mapping[str, list[float]]
    sample: int
    role: int
    before: int = 0

    def after(self, count: int) -> _Document:
        """The same without its first tokens, which lie in the document before."""
        numbers = {name: values[count:] for name, values in self.numbers.items()}
        return replace(
            self,
            input_ids=self.input_ids[count:],
            targets=self.targets[count:],
            weights=self.weights[count:],
            numbers=numbers,
            before=count,
        )


def _documents(example: Example, sample: int, role: int) -> Iterator[_Document]:
    start = 0
    for length in example.documents:
        stop = start + length
        labels = example.labels[start + 1 : stop]
        given = example.weights[start + 1 : stop] if example.weights is not None else [1.0] * (length - 1)
        weights = [w if label != IGNORE_INDEX else 0.0 for w, label in zip(given, labels, strict=True)]
        numbers = {name: [*values[start + 1 : stop], 0.0] for name, values in example.numbers.items()}
        yield _Document(example.input_ids[start:stop], [*labels, IGNORE_INDEX], [*weights, 0.0], numbers, sample, role)
        start = stop


def _examples(samples: Sequence[Sample]) -> Iterator[tuple[Example, int, int]]:
    for sample in samples:
        for role, example in enumerate(sample.sequences.values()):
            yield example, sample.index, role


def _group(samples: Sequence[Sample], policy: CutPolicy) -> list[list[Sample]]:
    """As few groups as first-fit finds (but `min_batches`), as even as that number allows: memory follows the largest.

    The samples of a group stay in their original order, and no sample is split.
    """
    lengths = [_lengths(sample, policy) for sample in samples]
    groups = _first_fit(lengths, policy, policy.max_tokens)
    count = max(len(groups), min(policy.min_batches, len(samples)))
    low, high = 1, policy.max_tokens
    while count > 1 and low < high:
        middle = (low + high) // 2
        evener = _first_fit(lengths, policy, middle)
        if len(evener) <= count:
            groups, high = evener, middle
        else:
            low = middle + 1
    return [[samples[i] for i in sorted(group)] for group in sorted(groups, key=min)]


def _lengths(sample: Sample, policy: CutPolicy) -> list[int]:
    """Of a sample's rows, or what goes into one, what is shared counted once."""
    if policy.apart and not policy.packed:
        return [length for example in sample.sequences.values() for length in example.documents]
    found = [len(example) for example in sample.sequences.values()]
    found[-1] -= _shared(sample, policy)  # nothing, but of a pair's second one
    return found


def _shared(sample: Sample, policy: CutPolicy) -> int:
    """Tokens that both sequences of a sample begin with and that the second one trains nothing at; 0 if there are none,
    or too few to be worth it."""
    if not (policy.packed and policy.shares_prompts and len(sample.sequences) == 2):
        return 0
    first, second = sample.sequences.values()
    if len(first.documents) > 1 or len(second.documents) > 1:
        return 0
    most, count = min(len(first), len(second) - 1), 0
    while count < most and first.input_ids[count] == second.input_ids[count]:
        if second.labels[count + 1] != IGNORE_INDEX:  # which the token at this place is trained to predict
            break
        count += 1
    return count if count >= policy.shares_prompts else 0


def _first_fit(lengths: Sequence[Sequence[int]], policy: CutPolicy, max_tokens: int) -> list[list[int]]:
    """First-fit decreasing.

    Args:
        lengths: of the sequences of each sample.
        max_tokens: as the policy's, in its place.
    Returns:
        the numbers of each group's samples.
    """
    groups: list[list[int]] = []
    sequences: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-sum(lengths[i]), i)):
        for group, held in zip(groups, sequences, strict=True):
            full = policy.max_samples is not None and len(group) >= policy.max_samples
            if not full and _size([*held, *lengths[i]], policy) <= max_tokens:
                group.append(i)
                held += lengths[i]
                break
        else:
            groups.append([i])
            sequences.append(list(lengths[i]))
    return groups


def _size(lengths: Sequence[int], policy: CutPolicy) -> int:
    """Positions that sequences of these lengths take together."""
    return sum(lengths) if policy.packed else max(lengths) * len(lengths)


def cut(samples: Sequence[Sample], policy: CutPolicy) -> list[Batch]:
    """The micro-batches of one step, on the host, in a fixed order."""
    build = _packed_batch if policy.packed else _padded_batch
    batches = [build(group, policy) for group in _group(samples, policy)]
    return [
        widen(batch, -(-batch.input_ids.shape[1] // policy.multiple) * policy.multiple, policy) for batch in batches
    ]


def widen(batch: Batch, width: int, policy: CutPolicy) -> Batch:
    """The same batch with rows of `width` positions; what is added trains nothing and counts for nothing.

    A packed row gets one more document, which belongs to no sample (its entry of `samples` is (0, 0)).
    """
    missing = width - batch.input_ids.shape[1]
    if missing == 0:
        return batch
    pad = partial(F.pad, pad=(0, missing))
    positions = torch.arange(missing).expand(batch.position_ids.shape[0], -1)
    if batch.cu_seqlens is None:
        positions = positions + batch.position_ids[:, -1:] + 1
        added: dict[str, Any] = {"document_ids": pad(batch.document_ids, value=-1)}
    else:
        added = {
            "document_ids": pad(batch.document_ids, value=len(batch.lengths)),
            "cu_seqlens": torch.cat([batch.cu_seqlens, batch.cu_seqlens.new_tensor([width])]),
            "lengths": (*batch.lengths, missing),
            "samples": (*batch.samples, (0, 0)),
        }
        if batch.keys is not None:
            keys, own = batch.keys, torch.arange(width - missing, width)
            offsets = torch.cat([keys.offsets, keys.offsets[-1:] + missing])
            places = torch.stack([len(keys.index) + torch.arange(missing), torch.full((missing,), -1)])
            index, places = torch.cat([keys.index, own]), torch.cat([keys.places, places], dim=1)
            added["keys"] = Keys(index, offsets, (*keys.lengths, missing), places)
    return replace(
        batch,
        input_ids=pad(batch.input_ids, value=policy.pad_token_id),
        targets=pad(batch.targets, value=IGNORE_INDEX),
        weights=pad(batch.weights),
        numbers={name: pad(values) for name, values in batch.numbers.items()},
        position_ids=torch.cat([batch.position_ids, positions], dim=1),
        noise=None if batch.noise is None else Noise(pad(batch.noise.keys), pad(batch.noise.lengths, value=1)),
        **added,
    )


def equalize(batches: Sequence[Batch]) -> list[Batch]:
    """The same micro-batches, all of one shape; what is added trains nothing and counts for nothing."""
    rows = max(batch.input_ids.shape[0] for batch in batches)
    width = max(batch.input_ids.shape[1] for batch in batches)
    policy = CutPolicy(packed=batches[0].is_packed, max_tokens=width)
    return [_more_rows(widen(batch, width, policy), rows) for batch in batches]


def _more_rows(batch: Batch, rows: int) -> Batch:
    """A padded batch with rows of padding below."""
    missing = rows - batch.input_ids.shape[0]
    if missing == 0:
        return batch
    below = (0, 0, 0, missing)
    positions = torch.arange(batch.input_ids.shape[1]).expand(missing, -1)
    return replace(
        batch,
        input_ids=F.pad(batch.input_ids, below),
        targets=F.pad(batch.targets, below, value=IGNORE_INDEX),
        weights=F.pad(batch.weights, below),
        numbers={name: F.pad(values, below) for name, values in batch.numbers.items()},
        position_ids=torch.cat([batch.position_ids, positions]),
        document_ids=F.pad(batch.document_ids, below, value=-1),
    )


def without_targets(batch: Batch, documents: Sequence[int]) -> Batch:
    """The same batch, nothing of these documents trained."""
    gone = torch.isin(batch.document_ids, torch.tensor(documents, dtype=batch.document_ids.dtype))
    return replace(
        batch,
        targets=batch.targets.masked_fill(gone, IGNORE_INDEX),
        weights=batch.weights.masked_fill(gone, 0.0),
    )


def pairs_of(batch: Batch) -> list[tuple[int, int]]:
    """Documents of samples of two sequences: for each sample the numbers of its first and of its second one.

    What fills a micro-batch up belongs to no such sample.
    """
    roles = batch.samples
    return [
        (number, number + 1)
        for number in range(len(roles) - 1)
        if roles[number][1] == 0 and roles[number + 1] == (roles[number][0], 1)
    ]


def filler(policy: CutPolicy) -> Batch:
    """A micro-batch that trains nothing and counts for nothing: what a rank runs that has fewer than the others."""
    empty = Sample({"": Example([policy.pad_token_id] * 2, [IGNORE_INDEX] * 2)}, 0)
    [batch] = cut([empty], policy)
    return replace(batch, num_tokens=0)


def _packed_batch(samples: Sequence[Sample], policy: CutPolicy) -> Batch:
    documents = [doc for sample in samples for doc in _documents_of(sample, policy)]
    lengths = tuple(len(doc.input_ids) for doc in documents)
    sizes = torch.tensor(lengths, dtype=torch.int32)
    starts = torch.cat([torch.zeros(1, dtype=torch.int32), sizes.cumsum(0, dtype=torch.int32)])
    document_ids = torch.repeat_interleave(torch.arange(len(documents), dtype=torch.int32), sizes)
    before = torch.tensor([doc.before for doc in documents])
    positions = torch.arange(int(starts[-1])) + (before - starts[:-1])[document_ids.long()]
    return Batch(
        input_ids=torch.tensor([[t for doc in documents for t in doc.input_ids]]),
        targets=torch.tensor([[t for doc in documents for t in doc.targets]]),
        weights=torch.tensor([[w for doc in documents for w in doc.weights]], dtype=torch.float32),
        numbers={
            name: torch.tensor([[v for doc in documents for v in doc.numbers[name]]], dtype=torch.float32)
            for name in _number_names(documents)
        },
        position_ids=positions[None],
        document_ids=document_ids[None],
        cu_seqlens=starts,
        lengths=lengths,
        num_tokens=sum(lengths),
        samples=tuple((doc.sample, doc.role) for doc in documents),
        extras=_extras(samples),
        keys=_keys(documents, starts.tolist()) if any(doc.before for doc in documents) else None,
    )


def _documents_of(sample: Sample, policy: CutPolicy) -> list[_Document]:
    """All documents of a packed sample."""
    found = [doc for example, index, role in _examples([sample]) for doc in _documents(example, index, role)]
    if count := _shared(sample, policy):
        found[1] = found[1].after(count)
    return found


def _keys(documents: Sequence[_Document], starts: Sequence[int]) -> Keys:
    lengths = tuple(doc.before + len(doc.input_ids) for doc in documents)
    offsets = [0, *accumulate(lengths)]
    index, places = torch.empty(offsets[-1], dtype=torch.long), torch.full((2, starts[-1]), -1)
    for number, doc in enumerate(documents):
        seen, own = torch.arange(offsets[number], offsets[number + 1]).split([doc.before, len(doc.input_ids)])
        if doc.before:
            others = slice(starts[number - 1], starts[number - 1] + doc.before)
            index[seen] = torch.arange(others.start, others.stop)
            places[1, others] = seen
        index[own] = torch.arange(starts[number], starts[number + 1])
        places[0, starts[number] : starts[number + 1]] = own
    return Keys(index, torch.tensor(offsets, dtype=torch.int32), lengths, places)


def _number_names(documents: Sequence[_Document]) -> list[str]:
    """Names of the numbers that all documents have."""
    return sorted(set.intersection(*(set(doc.numbers) for doc in documents))) if documents else []


def _extras(samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
    """By name [D] fp32, for each document its sample's number; names that not all samples have are left out."""
    names = set.intersection(*(set(sample.extras) for sample in samples)) if samples else set()
    sizes = [sum(len(example.documents) for example in sample.sequences.values()) for sample in samples]
    return {
        name: torch.tensor(
            [sample.extras[name] for sample, size in zip(samples, sizes, strict=True) for _ in range(size)],
            dtype=torch.float32,
        )
        for name in sorted(names)
    }


def _padded_batch(samples: Sequence[Sample], policy: CutPolicy) -> Batch:
    rows = [list(_documents(example, index, role)) for example, index, role in _examples(samples)]
    if policy.apart:
        rows = [[doc] for row in rows for doc in row]
    width = max(sum(len(doc.input_ids) for doc in row) for row in rows)
    shape = (len(rows), width)
    input_ids = torch.full(shape, policy.pad_token_id, dtype=torch.int64)
    targets = torch.full(shape, IGNORE_INDEX, dtype=torch.int64)
    weights = torch.zeros(shape, dtype=torch.float32)
    positions = torch.zeros(shape, dtype=torch.int64)
    document_ids = torch.full(shape, -1, dtype=torch.int32)
    documents: list[_Document] = []
    numbers = {name: torch.zeros(shape) for name in _number_names([doc for row in rows for doc in row])}
    for r, row in enumerate(rows):
        start = 0
        for doc in row:
            stop = start + len(doc.input_ids)
            input_ids[r, start:stop] = torch.tensor(doc.input_ids)
            targets[r, start:stop] = torch.tensor(doc.targets)
            weights[r, start:stop] = torch.tensor(doc.weights)
            for name, values in numbers.items():
                values[r, start:stop] = torch.tensor(doc.numbers[name])
            # The padding continues the last document's positions: it is not a document of its own, and a causal
            # model never looks at it from the left.
            positions[r, start:] = torch.arange(width - start)
            document_ids[r, start:stop] = len(documents)
            documents.append(doc)
            start = stop
    return Batch(
        input_ids=input_ids,
        targets=targets,
        weights=weights,
        numbers=numbers,
        position_ids=positions,
        document_ids=document_ids,
        cu_seqlens=None,
        lengths=tuple(len(doc.input_ids) for doc in documents),
        num_tokens=sum(len(doc.input_ids) for doc in documents),
        samples=tuple((doc.sample, doc.role) for doc in documents),
        extras=_extras(samples),
    )
