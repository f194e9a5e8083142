"""Every layout worth a look for a model on a cluster: which sizes each axis may take, and what rules the others out.

Sizes are kept to those that a person would consider, so that a thousand GPUs give some hundreds of layouts: tensor
parallelism within the fast link, shards of a node and doublings of it, context parallelism for long sequences only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from fourfold.base.errors import PlanError
from fourfold.planning.axes import ModelFacts, check_layout
from fourfold.planning.hardware import Cluster
from fourfold.planning.job import Job
from fourfold.planning.layout import Layout, resolve_layout
from fourfold.planning.shape import ModelShape
from fourfold.planning.wishes import Wishes, obstacles

LONG_SEQUENCE = 8192
"""Positions from which a sequence may be shared by ranks; each then has at least half as many."""

_MOST = {"tp": 16, "cp": 32, "pp": 64, "ep": 64}
_USUAL_NODE = 8
_SIZES = ("dp_replicate", "dp_shard", "cp", "tp", "pp", "ep")


@dataclass(frozen=True, slots=True)
class Rejected:
    """A layout, or several of a kind, that was dropped.

    Attributes:
        what: for people, e.g. `dp_shard 8 x tp 2` or `dp_replicate x tp (6 layouts)`.
        reason: one line.
        device_bytes: the least that any of them needs on its most loaded GPU; None if that is not the reason.
        axes: those larger than one that all of them use.
    """

    what: str
    reason: str
    device_bytes: int | None = None
    axes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """One entry of `rejected`."""
        gib = None if self.device_bytes is None else self.device_bytes / 2**30
        return {"layout": self.what, "reason": self.reason, "device_gib": gib}


def facts_of(shape: ModelShape) -> ModelFacts:
    """What of a model the axes divide."""
    return ModelFacts(shape.num_layers, shape.heads, shape.kv_heads, shape.intermediate, shape.experts)


def candidates(
    shape: ModelShape, job: Job, cluster: Cluster, wishes: Wishes
) -> tuple[tuple[Layout, ...], tuple[Rejected, ...]]:
    """The layouts to look at, simplest first, and what was ruled out without predicting anything.

    A strategy that is named has one layout; `auto` leaves every size open that is not given. Layouts that differ only
    in what the shards keep whole (`zero`) count once, with zero 3.

    Raises:
        PlanError: the sizes or the strategy that the config gives cannot work here.
    """
    if wishes.parallel.strategy != "auto":
        layout = resolve_layout(wishes.parallel, cluster.world_size)
        problems = _problems_of_given(layout, shape, job, wishes)
        if problems:
            raise PlanError("\n".join(problems))
        return (layout,), ()
    barred = obstacles(shape, job, wishes)
    rejected = [Rejected(axis, reason, axes=(axis,)) for axis, reason in barred.items() if cluster.world_size > 1]
    _check_given(shape, job, cluster, wishes)
    facts, found, idle = facts_of(shape), list[Layout](), 0
    for layout in _enumerate(shape, job, cluster, wishes, barred):
        if check_layout(layout, facts) or not _can_offload(layout):
            continue
        if layout.dp > wishes.job_of(job, layout).sequences_per_step:
            idle += 1
        else:
            found.append(layout)
    if idle:
        sequences = f"{job.sequences_per_step} sequences of a step"
        what = f"more than {job.sequences_per_step} data-parallel ranks ({_count(idle)})"
        rejected.append(Rejected(what, f"there are only {sequences} to share; raise global_batch_size"))
    if not found:
        raise PlanError(_none_left(job, cluster, wishes))
    rejected += _fixed_sizes(shape, cluster, barred, facts)
    return tuple(sorted(dict.fromkeys(found), key=simplicity)), tuple(rejected)


def name_of(layout: Layout) -> str:
    """A layout in as few words as are clear, with what its sizes do not tell."""
    text = layout.describe().replace(", zero stage ", ", zero ")
    if layout.cp_shards and layout.dp_shard == 1:
        text += ", sharded over cp"
    if layout.pp > 1 and layout.pp_schedule != "1f1b":
        text += f", {layout.pp_schedule.removesuffix('_1f1b')}"
    return text if layout.offload == "none" else f"{text}, offload {layout.offload}"


def simplicity(layout: Layout) -> tuple[int, ...]:
    """A key that sorts simple layouts first: few axes, then small tp, pp and cp, experts over about a node's GPUs, then
    plain replicas."""
    used = sum(size > 1 for size in layout.sizes().values())
    interleaved = int(layout.pp > 1 and layout.pp_schedule != "1f1b")
    experts = abs(layout.ep - _USUAL_NODE) if layout.ep > 1 else 0
    return (used, layout.tp, layout.pp, interleaved, layout.cp, experts, layout.shards, 4 - layout.zero)


def _enumerate(
    shape: ModelShape, job: Job, cluster: Cluster, wishes: Wishes, barred: dict[str, str]
) -> Iterator[Layout]:
    for tp in _tensor_sizes(cluster, wishes, barred):
        for cp in _context_sizes(job, cluster, wishes, barred):
            for pp in _pipeline_sizes(shape, cluster, wishes, barred):
                dp, rest = divmod(cluster.world_size, tp * cp * pp)
                if rest:
                    continue
                local = cluster.domain // (tp * cp)
                for shard in _shard_sizes(dp, local, cp, wishes, barred):
                    for ep in _expert_sizes(shape, shard * cp, wishes, barred):
                        sizes = {"dp_replicate": dp // shard, "dp_shard": shard, "cp": cp, "tp": tp, "pp": pp, "ep": ep}
                        if all(getattr(wishes.parallel, name) in (None, sizes[name]) for name in _SIZES):
                            yield from _settled(sizes, shape, wishes, barred)


def _can_offload(layout: Layout) -> bool:
    """Weights leave for the host shard by shard, and not while a pipeline keeps them gathered."""
    return layout.offload != "params" or (layout.shards > 1 and layout.pp == 1)


def _settled(sizes: dict[str, Any], shape: ModelShape, wishes: Wishes, barred: dict[str, str]) -> Iterator[Layout]:
    """Layouts of these sizes with the settings that go with them."""
    parallel = wishes.parallel
    base = Layout(
        **sizes,
        reshard=parallel.reshard_after_forward,
        offload=parallel.offload,
        sequence_parallel=parallel.sequence_parallel is not False,
        loss_parallel=parallel.loss_parallel is not False,
        cp_method=_cp_method(sizes, shape, wishes),
        pp_schedule=parallel.pp_schedule,
        pp_microbatches=parallel.pp_microbatches or 0,
        pp_layers=parallel.pp_layers_per_stage or (),
        pp_overlap_p2p=parallel.pp_overlap_p2p,
    )
    schedules: list[Any] = [parallel.pp_schedule]
    if sizes["pp"] > 1 and not wishes.is_given("pp_schedule") and not base.pp_layers:
        schedules = ["1f1b", "interleaved_1f1b"]
    # a named strategy that shards also shards over cp; see resolve_layout
    over_cp: tuple[bool, ...] = (False,)
    if sizes["cp"] > 1 and "dp_shard" not in barred:
        over_cp = (True,) if sizes["dp_shard"] > 1 or sizes["ep"] > 1 else (False, True)
    for schedule in schedules:
        for shards in over_cp:
            yield replace(base, pp_schedule=schedule, cp_shards=shards)


def _cp_method(sizes: dict[str, int], shape: ModelShape, wishes: Wishes) -> Literal["allgather", "ulysses", "ring"]:
    """Exchanging heads for positions is fastest, where heads divide."""
    if wishes.is_given("cp_method") or sizes["cp"] == 1:
        return wishes.parallel.cp_method
    return "allgather" if shape.heads % (sizes["tp"] * sizes["cp"]) else "ulysses"


def _tensor_sizes(cluster: Cluster, wishes: Wishes, barred: dict[str, str]) -> list[int]:
    if wishes.parallel.tp:
        return [wishes.parallel.tp]
    return [1] if "tp" in barred else [size for size in _divisors(cluster.domain) if size <= _MOST["tp"]]


def _context_sizes(job: Job, cluster: Cluster, wishes: Wishes, barred: dict[str, str]) -> list[int]:
    if wishes.parallel.cp:
        return [wishes.parallel.cp]
    if "cp" in barred or job.sequence < LONG_SEQUENCE:
        return [1]
    most = min(_MOST["cp"], 2 * job.sequence // LONG_SEQUENCE)
    return [size for size in _divisors(cluster.world_size) if size <= most]


def _pipeline_sizes(shape: ModelShape, cluster: Cluster, wishes: Wishes, barred: dict[str, str]) -> list[int]:
    if wishes.parallel.pp:
        return [wishes.parallel.pp]
    most = 1 if "pp" in barred else min(_MOST["pp"], shape.num_layers)
    return [size for size in _divisors(cluster.world_size) if size <= most]


def _shard_sizes(dp: int, local: int, cp: int, wishes: Wishes, barred: dict[str, str]) -> list[int]:
    """All data-parallel ranks, none, and between them a node's and doublings of it (replicas of sharded groups)."""
    if wishes.parallel.dp_shard:
        return [wishes.parallel.dp_shard] if dp % wishes.parallel.dp_shard == 0 else []
    if wishes.parallel.dp_replicate:
        return [dp // wishes.parallel.dp_replicate] if dp % wishes.parallel.dp_replicate == 0 else []
    if "dp_shard" in barred:
        return [1]
    sizes, size = {1, dp}, max(local, 1)
    while size < dp:
        if dp % size == 0:
            sizes.add(size)
        size *= 2
    return sorted(sizes)


def _expert_sizes(shape: ModelShape, ranks: int, wishes: Wishes, barred: dict[str, str]) -> list[int]:
    if wishes.parallel.ep:
        return [wishes.parallel.ep]
    if "ep" in barred or ranks == 1:
        return [1]
    return [size for size in _divisors(math.gcd(ranks, shape.experts)) if size <= _MOST["ep"]]


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _fixed_sizes(shape: ModelShape, cluster: Cluster, barred: dict[str, str], facts: ModelFacts) -> Iterator[Rejected]:
    """Sizes of tp within the link that the model's heads or widths do not allow."""
    if "tp" in barred:
        return
    sizes = [size for size in _divisors(cluster.domain) if 1 < size <= _MOST["tp"]]
    bad = [size for size in sizes if check_layout(Layout(tp=size), facts)]
    if bad:
        listed = ", ".join(map(str, bad))
        counts = f"{shape.heads} heads, {shape.kv_heads} key heads and an MLP of {shape.intermediate}"
        yield Rejected(f"tp {listed}", f"{'do' if len(bad) > 1 else 'does'} not divide {counts}")


def _check_given(shape: ModelShape, job: Job, cluster: Cluster, wishes: Wishes) -> None:
    """Refuse sizes that the config gives and that no choice of the others can mend.

    Raises:
        PlanError: with every problem.
    """
    parallel = wishes.parallel
    given = {name: getattr(parallel, name) for name in _SIZES if getattr(parallel, name)}
    alone = Layout(**{name: size for name, size in given.items() if name in ("tp", "pp")})
    alone = replace(alone, pp_schedule=parallel.pp_schedule, pp_layers=parallel.pp_layers_per_stage or ())
    problems = check_layout(alone, facts_of(shape))
    problems += _barred_sizes(given, obstacles(shape, job, wishes))
    product = math.prod(size for name, size in given.items() if name != "ep")
    if cluster.world_size % product or (
        len(given.keys() - {"ep"}) == len(_SIZES) - 1 and product != cluster.world_size
    ):
        named = " x ".join(f"{name} {size}" for name, size in given.items() if name != "ep")
        problems.append(
            f"parallel: {named} make {product} ranks, which do not divide {cluster.world_size} GPUs. Use sizes whose "
            f"product divides {cluster.world_size}, or another number of GPUs."
        )
    if problems:
        raise PlanError("\n".join(problems))


def _problems_of_given(layout: Layout, shape: ModelShape, job: Job, wishes: Wishes) -> list[str]:
    sizes = {name: size for name, size in layout.sizes().items() if size > 1}
    return [*check_layout(layout, facts_of(shape)), *_barred_sizes(sizes, obstacles(shape, job, wishes))]


def _barred_sizes(sizes: dict[str, int], barred: dict[str, str]) -> list[str]:
    return [
        f"parallel.{axis}: {size} cannot be used: {barred[axis]}. Use parallel.{axis}: 1."
        for axis, size in sizes.items()
        if size > 1 and axis in barred
    ]


def _none_left(job: Job, cluster: Cluster, wishes: Wishes) -> str:
    given = [f"{name} {getattr(wishes.parallel, name)}" for name in _SIZES if getattr(wishes.parallel, name)]
    sizes = f" with {' x '.join(given)}" if given else ""
    return (
        f"gpus: there is no way to split this model over {cluster.world_size} GPUs{sizes} and {job.sequences_per_step} "
        "sequences a step. Use a power of two of GPUs, or raise global_batch_size."
    )


def _count(number: int) -> str:
    return f"{number} layout" if number == 1 else f"{number} layouts"
