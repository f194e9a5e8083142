"""A layout: how a job is split, as plain numbers; chosen by a user or the planner, kept in every checkpoint and log."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes of the mesh axes.

    Attributes:
        dp_replicate: ranks that hold the same weights and different data.
        dp_shard: ranks that shard weights, gradients and optimizer state, with different data.
        cp: ranks that share a sequence.
        tp: ranks that share every matrix.
        pp: ranks that share the layers.
        ep: ranks that share the experts (of the data-parallel ranks).
    """

    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1

    @property
    def world_size(self) -> int:
        """Ranks of the whole job."""
        return self.dp_replicate * self.dp_shard * self.cp * self.tp * self.pp

    @property
    def dp(self) -> int:
        """Data-parallel ranks: those that see different samples."""
        return self.dp_replicate * self.dp_shard

    def as_dict(self) -> dict[str, int]:
        """For logs and checkpoints."""
        return asdict(self)
