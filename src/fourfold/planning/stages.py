"""Pipeline stages as numbers: how many there are, which rank runs them, and which layers each has.

With gpipe and 1f1b a rank runs one stage. interleaved_1f1b and zbv cut the model twice as fine and give each rank two
stages, so that it waits less at the start and the end of a step: 1f1b interleaved deals them out in rounds (rank 0 of
2: stages 0 and 2), zbv in a V (stages 0 and 3), which puts the first and the last stage on the same rank.
"""

from __future__ import annotations

from fourfold.planning.layout import Layout

_STAGES_PER_RANK = {"gpipe": 1, "1f1b": 1, "interleaved_1f1b": 2, "zbv": 2}


def num_stages(layout: Layout) -> int:
    """Stages of the whole pipeline."""
    return layout.pp * _STAGES_PER_RANK[layout.pp_schedule]


def stages_of_rank(layout: Layout, rank: int) -> tuple[int, ...]:
    """The stages that a rank of the pipeline runs, in rising order."""
    if _STAGES_PER_RANK[layout.pp_schedule] == 1:
        return (rank,)
    return (rank, 2 * layout.pp - 1 - rank) if layout.pp_schedule == "zbv" else (rank, rank + layout.pp)


def rank_of_stage(layout: Layout, stage: int) -> int:
    """The rank of the pipeline that runs a stage; a negative number counts from the last."""
    index = stage % num_stages(layout)
    return next(rank for rank in range(layout.pp) if index in stages_of_rank(layout, rank))


def pipelines(layout: Layout) -> list[list[int]]:
    """The ranks of each pipeline of a job: pp is the first axis of its mesh, which counts through the last first."""
    apart = layout.world_size // layout.pp
    return [[first + apart * place for place in range(layout.pp)] for first in range(apart)]


def stage_layers(layout: Layout, num_layers: int) -> list[range]:
    """The layers of each stage, first to last.

    An even split gives what is left over to the middle stages first, since the first also has the embedding, and to
    the last stage last, since it also has the head and the loss.
    """
    stages = num_stages(layout)
    counts = list(layout.pp_layers)
    if not counts:
        base, rest = divmod(num_layers, stages)
        counts = [base] * stages
        for stage in [*range(1, stages - 1), 0, stages - 1][:rest]:
            counts[stage] += 1
    starts = [sum(counts[:stage]) for stage in range(stages)]
    return [range(start, start + count) for start, count in zip(starts, counts, strict=True)]


def min_microbatches(layout: Layout) -> int:
    """Micro-batches of a step below which ranks idle or the schedule does not run."""
    wanted = max(layout.pp_microbatches, layout.pp)
    return round_microbatches(layout, wanted)


def round_microbatches(layout: Layout, count: int) -> int:
    """The least number of micro-batches from `count` on that the schedule can run."""
    if layout.pp_schedule == "1f1b":
        return max(count, layout.pp)
    if layout.pp_schedule == "interleaved_1f1b":
        return -(-count // layout.pp) * layout.pp
    return count


def check_stages(layout: Layout, num_layers: int) -> list[str]:
    """What of the pipeline does not fit a model with so many layers, one message each."""
    stages = num_stages(layout)
    if layout.pp == 1:
        return []
    if stages > num_layers:
        per_rank = f"{layout.pp_schedule} cuts the model into {stages} stages"
        fits = num_layers // _STAGES_PER_RANK[layout.pp_schedule]
        other = f"parallel.pp: {fits} or " if fits > 1 else ""
        return [
            f"parallel.pp: {layout.pp}: {per_rank}, and it has {num_layers} layers. Use {other}"
            "parallel.pp_schedule: 1f1b with at most as many stages as layers."
        ]
    given = layout.pp_layers
    if not given:
        return []
    if len(given) != stages:
        return [
            f"parallel.pp_layers_per_stage: {len(given)} numbers for {stages} stages (pp {layout.pp}, "
            f"{layout.pp_schedule}). Give {stages}."
        ]
    if sum(given) != num_layers or min(given) < 1:
        return [
            f"parallel.pp_layers_per_stage: {list(given)} are {sum(given)} layers in all, and the model has "
            f"{num_layers}. Give each stage at least one."
        ]
    return []
