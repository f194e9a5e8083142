"""What the ranks of a job must have in common, and what they found out each for itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from fourfold.base.errors import PlanError
from fourfold.base.log import get_logger
from fourfold.config.schema import NESTED, Run
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
