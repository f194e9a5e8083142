"""A layout: how a job is split, as plain numbers; chosen by a user or the planner, kept in every checkpoint and log."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal

from fourfold.base.errors import PlanError
from fourfold.config.parallel import ParallelConfig

_SIZES = ("dp_replicate", "dp_shard", "cp", "tp", "pp", "ep")


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes of the mesh axes, and how sharded data parallelism spends memory.

    Attributes:
        dp_replicate: ranks that hold the same weights and different data.
        dp_shard: ranks that shard weights, gradients and optimizer state, with different data.
        cp: ranks that share a sequence.
        tp: ranks that share every matrix.
        pp: ranks that share the layers.
        ep: ranks that share the experts (of the data-parallel ranks).
        zero: what dp_shard keeps whole between its uses: 3 nothing, 2 weights during a step, 1 weights and
            gradients during a step.
        reshard: free gathered weights after the forward pass; None for what the stage says.
        offload: what the host keeps: nothing, the optimizer's state, or the shards of weights as well.
        sequence_parallel: tp ranks also share the positions between attention and MLP.
        loss_parallel: tp ranks share the vocabulary of the loss; False gathers the logits.
        cp_method: how cp ranks see each other's keys and values.
        cp_shards: with cp and without dp_shard, weights are sharded over cp instead of replicated.
        pp_schedule: order of work in the pipeline.
        pp_microbatches: micro-batches of a step in the pipeline at least; 0 for as many as it needs.
        pp_layers: layers of each stage, first to last; empty for an even split.
        pp_overlap_p2p: interleaved stages send and receive by groups of their own.
    """

    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1
    zero: int = 3
    reshard: bool | None = None
    offload: Literal["none", "optimizer", "params"] = "none"
    sequence_parallel: bool = True
    loss_parallel: bool = True
    cp_method: Literal["allgather", "ulysses", "ring"] = "allgather"
    cp_shards: bool = False
    pp_schedule: Literal["gpipe", "1f1b", "interleaved_1f1b", "zbv"] = "1f1b"
    pp_microbatches: int = 0
    pp_layers: tuple[int, ...] = ()
    pp_overlap_p2p: bool = True

    @property
    def world_size(self) -> int:
        """Ranks of the whole job."""
        return self.dp_replicate * self.dp_shard * self.cp * self.tp * self.pp

    @property
    def dp(self) -> int:
        """Data-parallel ranks: those that see different samples."""
        return self.dp_replicate * self.dp_shard

    @property
    def shards(self) -> int:
        """Ranks over which FSDP shards weights: dp_shard x cp, or 1 where it does not shard.

        With expert parallelism, which regroups just these ranks, it always shards.
        """
        return self.dp_shard * self.cp if self.dp_shard > 1 or self.cp_shards or self.ep > 1 else 1

    @property
    def splits_model(self) -> bool:
        """Whether some rank holds only a part of the model."""
        return self.world_size > self.dp_replicate * self.cp or self.shards > 1

    @property
    def reshards(self) -> bool:
        """Whether dp_shard frees gathered weights after the forward pass."""
        return self.zero == 3 if self.reshard is None else self.reshard

    @property
    def shares_vocabulary(self) -> bool:
        """Whether ranks share the vocabulary of the loss."""
        return self.tp > 1 and self.loss_parallel

    @property
    def overlaps_p2p(self) -> bool:
        """Whether sends and receives between stages have groups of their own."""
        return self.pp > 1 and self.pp_schedule == "interleaved_1f1b" and self.pp_overlap_p2p

    @property
    def splits_backward(self) -> bool:
        """Whether a stage makes the gradients of its weights apart from those of its inputs, and later."""
        return self.pp > 1 and self.pp_schedule == "zbv"

    def of_a_layer(self) -> Layout:
        """What a layer, the embedding and the head see of it: with all that changes nothing within them left out.

        Many layouts have the same, so that what is known of a layer is looked up and not reckoned again.
        """
        return _of_a_layer(self)

    def as_dict(self) -> dict[str, Any]:
        """For logs and checkpoints."""
        return asdict(self)

    def sizes(self) -> dict[str, int]:
        """Ranks on each axis, `ep` too."""
        return {name: getattr(self, name) for name in _SIZES}

    def describe(self) -> str:
        """The axes larger than one, e.g. `dp_shard 4 x tp 2`; `one process` if there is none."""
        sizes = {name: size for name, size in self.sizes().items() if size > 1}
        text = " x ".join(f"{name} {size}" for name, size in sizes.items()) or "one process"
        return f"{text}, zero stage {self.zero}" if self.shards > 1 and self.zero < 3 else text


@lru_cache(maxsize=4096)
def _of_a_layer(layout: Layout) -> Layout:
    return Layout(
        dp_shard=layout.dp_shard,
        cp=layout.cp,
        tp=layout.tp,
        pp=min(layout.pp, 2),
        ep=layout.ep,
        sequence_parallel=layout.sequence_parallel,
        cp_method=layout.cp_method,
        cp_shards=layout.cp_shards,
        pp_schedule="zbv" if layout.splits_backward else "1f1b",
    )


_ZERO = {"zero1": 1, "zero2": 2}
SHARDED = ("zero1", "zero2", "zero3", "fsdp")
"""Strategies that shard over all ranks that no size claims."""


def resolve_layout(config: ParallelConfig, world_size: int) -> Layout:
    """The layout that strategy and sizes ask for on so many ranks.

    Sizes that are given hold; what is left of the world goes to the axis that the strategy names (`auto`: replicas, and
    shards where experts are cut).

    Raises:
        PlanError: the sizes do not multiply to the world, with those that would.
    """
    given = {name: getattr(config, name) for name in ("dp_replicate", "dp_shard", "cp", "tp", "pp")}
    sizes = {name: size or 1 for name, size in given.items()}
    product = 1
    for size in sizes.values():
        product *= size
    # experts are shared by ranks that shard, so these get what is left
    strategy = "fsdp" if config.strategy == "auto" and (config.ep or 1) > 1 else config.strategy
    rest, remainder = divmod(world_size, product)
    if remainder or (strategy in ("single", "custom") and rest > 1):
        raise PlanError(_mismatch(given, product, world_size))
    if rest > 1:
        axis = _free_axis(strategy, given)
        if axis is None:
            raise PlanError(_mismatch(given, product, world_size))
        if strategy == "hsdp" and given["dp_replicate"] is None and given["dp_shard"] is None:
            # Without sizes, two replicas of the largest shards: the least that is both.
            if rest % 2:
                raise PlanError(f"strategy: hsdp needs an even number of ranks, and {rest} are left. Use fsdp.")
            sizes["dp_replicate"], rest = 2, rest // 2
        sizes[axis] *= rest
    return Layout(
        **sizes,
        ep=config.ep or 1,
        zero=_ZERO.get(strategy, 3),
        reshard=config.reshard_after_forward,
        offload=config.offload,
        sequence_parallel=config.sequence_parallel is not False,
        loss_parallel=config.loss_parallel is not False,
        cp_method=config.cp_method,
        cp_shards=strategy in (*SHARDED, "hsdp") and sizes["cp"] > 1,
        pp_schedule=config.pp_schedule,
        pp_microbatches=config.pp_microbatches or 0,
        pp_layers=config.pp_layers_per_stage or (),
        pp_overlap_p2p=config.pp_overlap_p2p,
    )


def _free_axis(strategy: str, given: dict[str, int | None]) -> str | None:
    """The axis that takes the ranks which no size claims; None if all are given."""
    wanted = {"tp": "tp", "pp": "pp", "hsdp": "dp_shard", "ddp": "dp_replicate", "auto": "dp_replicate"}
    axis = "dp_shard" if strategy in SHARDED else wanted.get(strategy)
    if axis is not None and given[axis] is None:
        return axis
    free = [name for name in ("dp_replicate", "dp_shard") if given[name] is None]
    return free[0] if free else None


def _mismatch(given: dict[str, int | None], product: int, world_size: int) -> str:
    processes = "there is 1 process" if world_size == 1 else f"there are {world_size} processes"
    named = " x ".join(f"{name} {size}" for name, size in given.items() if size)
    if not named:
        return (
            f"strategy: takes one process, but there are {world_size}. Start one (--nproc 1), use fsdp or ddp, or give "
            "the sizes of the axes under parallel."
        )
    return (
        f"parallel: {named} make {product} ranks, but {processes}. Start {product} "
        f"(--nproc {product}), or choose sizes whose product divides {world_size}; strategy fsdp or ddp takes the rest."
    )
