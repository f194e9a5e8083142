"""What the ranks of a job must have in common, and what they found out each for itself."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from fourfold.base.errors import DataError, FourfoldError, PlanError
from fourfold.base.log import get_logger
from fourfold.config.schema import NESTED, Run
from fourfold.dataset.prepare import Prepared, name_eval
from fourfold.dataset.saved import TRAIN
from fourfold.dataset.storage import TokenisedDataset
from fourfold.dataset.stream import SampleStream
from fourfold.parallel.mesh import Mesh
from fourfold.parallel.whole import everyone
from fourfold.training import folder
from fourfold.training.memory import peak_memory_figures

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class RankFacts:
    """What one rank brings.

    Attributes:
        versions: of packages, by name.
        config: the resolved config by key, as text.
        gpu: the device's model; empty on a CPU.
    """

    versions: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, str] = field(default_factory=dict)
    gpu: str = ""

    @classmethod
    def of(cls, run: Run, device: torch.device) -> RankFacts:
        """Those of this process."""
        keys = run.flat()
        nested = {f"{NESTED}.{name}": value for name, value in keys.pop(NESTED).items()}
        config = {name: str(value) for name, value in (keys | nested).items()}
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        return cls({name: str(version) for name, version in folder.versions().items()}, config, gpu)

    def digest(self) -> str:
        """A hash of all that must be equal."""
        content = json.dumps([dict(self.versions), dict(self.config)], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


def compare_ranks(mine: RankFacts) -> None:
    """Check that every rank runs the same config on the same versions; every rank must call.

    GPUs of different models work, at the speed and with the memory of the least of them; rank 0 warns.

    Raises:
        PlanError: on every rank, naming the first rank that differs from rank 0, and in what.
    """
    found = everyone((mine.digest(), mine.gpu))
    if len({digest for digest, _ in found}) > 1:
        facts: list[RankFacts] = everyone(mine)
        rank = next(rank for rank, (digest, _) in enumerate(found) if digest != found[0][0])
        raise PlanError(_difference(facts[0], facts[rank], rank))
    models = [gpu for _, gpu in found]
    other = next((rank for rank, gpu in enumerate(models) if gpu != models[0]), None)
    if other is not None and (not dist.is_initialized() or dist.get_rank() == 0):
        log.warning(
            "The ranks have different GPUs: %s (rank 0), %s (rank %d). All wait for the slowest, and the smallest "
            "memory decides what fits.",
            models[0],
            models[other] or "none",
            other,
        )


def _difference(first: RankFacts, other: RankFacts, rank: int) -> str:
    for name in sorted({*first.versions, *other.versions}):
        ours, theirs = first.versions.get(name, "none"), other.versions.get(name, "none")
        if ours != theirs:
            return (
                f"{name}: rank 0 has version {ours}, rank {rank} has {theirs}. Install the same versions on every "
                "machine."
            )
    missing = "not set"
    for name in sorted({*first.config, *other.config}):
        ours, theirs = first.config.get(name, missing), other.config.get(name, missing)
        if ours != theirs:
            return (
                f"{name}: rank 0 has {ours}, rank {rank} has {theirs}. Start every machine with the same config file "
                "and arguments."
            )
    raise AssertionError("equal facts have equal digests")


@dataclass(frozen=True, slots=True)
class _Contents:
    """What is in the data set of a rank.

    Attributes:
        digest: of its samples; of a stream, of what its files tell without being read.
        counts: samples and tokens of each set by name; of a stream none.
    """

    digest: str
    counts: Mapping[str, tuple[int, int]] = field(default_factory=dict)


def prepare_alike(prepare: Callable[[], Prepared]) -> Prepared:
    """The data of this rank, checked to be what every rank has; every rank must call.

    Ranks of one machine share their files, those of several need not. Fingerprints are compared first, which is all
    that it takes where they are equal; samples are read only where they are not, since paths may differ.

    Raises:
        DataError: on every rank, naming the ranks whose data differs from rank 0's, and in what; or what kept a rank
            from having any.
    """
    data: Prepared | None = None
    fault: FourfoldError | None = None
    try:
        data = prepare()
    except FourfoldError as error:
        fault = error
    streamed = "" if data is None or data.stream is None else data.stream.digest()
    mine = ({} if data is None else data.fingerprints, streamed, None if fault is None else str(fault))
    found = everyone((mine, socket.gethostname()))
    hosts = [host for _, host in found]
    faults = {rank: told for rank, ((_, _, told), _) in enumerate(found) if told is not None}
    if fault is not None:
        raise fault
    if faults:
        rank, told = next(iter(faults.items()))
        raise DataError(f"{_named([rank], hosts)} has no data to train on: {told}")
    assert data is not None
    if any(facts != found[0][0] for facts, _ in found):
        _compare_contents(everyone(_contents(data)), hosts)
    return data


def _contents(data: Prepared) -> dict[str, _Contents]:
    """By what it is for, each data set's."""
    sources = {TRAIN: data.train or data.stream, **{name_eval(name): source for name, source in data.eval.items()}}
    return {name: _contents_of(source) for name, source in sources.items() if source is not None}


def _contents_of(source: TokenisedDataset | SampleStream) -> _Contents:
    if isinstance(source, SampleStream):
        return _Contents(source.digest())
    return _Contents(source.digest(), {name: (stats.samples, stats.tokens) for name, stats in source.stats.items()})


def _compare_contents(found: Sequence[Mapping[str, _Contents]], hosts: Sequence[str]) -> None:
    """Refuse data sets that are not equal.

    Args:
        found: of each rank its data sets by what they are for.
        hosts: of each rank its machine.
    """
    for name in dict.fromkeys(name for contents in found for name in contents):
        mine = [contents.get(name, _Contents("")) for contents in found]
        others = [rank for rank, contents in enumerate(mine) if contents.digest != mine[0].digest]
        if others:
            key = "dataset" if name == TRAIN else "eval_dataset"
            whose = f"{_named(others, hosts)} {'has' if len(others) == 1 else 'have'} other data ({name}) than"
            what = _in_what(mine[0].counts, mine[others[0]].counts)
            raise DataError(f"{key}: {whose} {_named([0], hosts)}: {what}. Put the same files on every machine.")


def _in_what(first: Mapping[str, tuple[int, int]], other: Mapping[str, tuple[int, int]]) -> str:
    """How the sets of a rank differ from those of rank 0."""
    differing = [name for name in {**first, **other} if first.get(name) != other.get(name)]
    if not differing:
        return f"as much of {', '.join(first)}, but not the same" if first else "its files are not the same"
    name = differing[0]
    (samples, tokens), (wanted, wanted_tokens) = other.get(name, (0, 0)), first.get(name, (0, 0))
    return f"{samples:,} samples of {name} with {tokens:,} tokens, not {wanted:,} with {wanted_tokens:,}"


def _named(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Ranks with their machines, e.g. `ranks 8 to 15 (node-b)`."""
    listed = f"rank {ranks[0]}"
    if len(ranks) > 1:
        joined = ranks[-1] - ranks[0] + 1 == len(ranks)
        listed = f"ranks {ranks[0]} to {ranks[-1]}" if joined else f"ranks {', '.join(map(str, ranks))}"
    return f"{listed} ({', '.join(dict.fromkeys(hosts[rank] for rank in ranks))})"


def peak_memory_of_ranks(mesh: Mesh) -> dict[str, float]:
    """The least and the largest peak memory of all ranks in GiB, and whose they are; every rank must call.

    Of a single process `peak_memory_gib` alone.
    """
    peaks: list[float] = everyone(peak_memory_figures()["peak_memory_gib"])
    if len(peaks) == 1:
        return {"peak_memory_gib": round(peaks[0], 4)}
    low, high = min(peaks), max(peaks)
    figures = {
        "peak_memory_gib_min": round(low, 4),
        "peak_memory_gib_max": round(high, 4),
        "peak_memory_min_rank": peaks.index(low),
        "peak_memory_max_rank": peaks.index(high),
    }
    if mesh.rank == 0:
        words = "Peak memory of the ranks: %.2f GiB (rank %d) to %.2f GiB (rank %d)"
        log.info(words, low, peaks.index(low), high, peaks.index(high))
    return figures
