"""`strategy: auto` on GPUs: the fastest layout that the planner finds, and why, in a paragraph."""

from __future__ import annotations

from collections.abc import Callable

from fourfold.base.errors import ModelError, PlanError, first_line
from fourfold.base.log import get_logger
from fourfold.base.units import GIB, format_count
from fourfold.config.schema import Run
from fourfold.planning.candidates import name_of
from fourfold.planning.engines import STEPS_TO_PAY
from fourfold.planning.estimate import Estimate
from fourfold.planning.layout import Layout
from fourfold.planning.predictor import Form
from fourfold.planning.search import Plan, search
from fourfold.planning.wishes import Wishes
from fourfold.training.outlook import cluster_of_job, job_of, shape_of

log = get_logger(__name__)


def plan_auto(run: Run, world_size: int, works: Callable[[Layout], bool]) -> Form | None:
    """The planner's best layout with its recompute and micro-batch; what the config gives is kept.

    Args:
        works: whether the engine takes a layout.
    Returns:
        None where nothing is planned: on CPUs; and where planning fails or nothing fits, which is told.
    """
    try:
        cluster = cluster_of_job(run, world_size)
        if cluster is None:
            return None
        plan = search(shape_of(run), job_of(run), cluster, Wishes.of(run), rescue=False)
    except (ModelError, PlanError) as error:
        reason = first_line(error).rstrip(".")
        log.info("strategy: auto cannot plan (%s): replicas if one GPU holds the training state, else shards.", reason)
        return None
    for note in cluster.notes:
        log.warning("%s", note)
    best = next((found for found in plan.layouts if works(found.layout)), None)
    if best is None:
        _tell_nothing_fits(plan)
        return None
    for line in _paragraph(plan, best):
        log.info("%s", line)
    return Form(best.layout, best.recompute, best.micro_batch)


def _paragraph(plan: Plan, best: Estimate) -> list[str]:
    """What was taken, why, and what to expect of it."""
    cost, room = best.cost, plan.cluster.device.memory_gib
    kept = {"none": "activations kept", "selective": "recompute selective", "full": "recompute full"}[best.recompute]
    if best.keeps.spared:
        kept = f"{kept} but for {best.keeps.spared} of {plan.shape.num_layers} layers"
    how = ""
    if best.engine != "eager":
        how = ", with compiled layers" + (
            f", as from {STEPS_TO_PAY} steps on" if plan.wishes.compiles_by_default else ""
        )
    lines = [
        f"strategy: auto takes {name_of(best.layout)} on {plan.cluster.describe()}, with {kept} and micro-batches of "
        f"up to {format_count(best.micro_batch)} tokens.",
        f"Why: {best.reason}.",
        f"Predicted, with every sequence of {format_count(plan.job.sequence)} tokens{how}: a peak of "
        f"{best.memory.device / GIB:.1f} of {room:.1f} GiB on the most loaded GPU, {cost.step_s:.3g} s a step, "
        f"{format_count(round(cost.tokens_per_s))} tokens/s in all.",
    ]
    other = next((found for found in plan.layouts if found.layout.sizes() != best.layout.sizes()), None)
    rest = "`fourfold plan FILE` shows the other layouts, and why they were dropped."
    if other is not None:
        share = other.cost.tokens_per_s / cost.tokens_per_s
        rest = f"Next: {name_of(other.layout)}, at {share:.0%} of its speed. {rest}"
    return [*lines, rest]


def _tell_nothing_fits(plan: Plan) -> None:
    needs = [entry.device_bytes for entry in plan.rejected if entry.device_bytes is not None]
    if plan.layouts or not needs:
        log.warning("strategy: auto found no layout that this run's other keys allow. `fourfold plan FILE` tells more.")
        return
    log.warning(
        "strategy: auto found nothing that is predicted to fit: the leanest layout needs %.1f GiB, and a GPU has %.1f. "
        "`fourfold plan FILE` tells what to change.",
        min(needs) / GIB,
        plan.cluster.device.memory_gib,
    )
