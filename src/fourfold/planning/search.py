"""The search: which layouts of a job fit a cluster, ranked by predicted speed, and what would fit where none does.

Predicting is cheap but not free, so layouts are dropped early: first by a bound on what weights, gradients and
optimizer state take, then by the memory of each layout's leanest form (everything recomputed, one sequence at a
time). Those that are left are looked at in the order of what they could do at best, until no other can do better than
those found. All limits count layouts and never seconds, so the same job always gives the same plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from fourfold.planning.candidates import Rejected, candidates, name_of, simplicity
from fourfold.planning.estimate import Estimate, Memory
from fourfold.planning.fit import axes_in_use, axes_of, fitting_layouts, used_axes
from fourfold.planning.hardware import Cluster
from fourfold.planning.job import Job
from fourfold.planning.keeps import Keeps
from fourfold.planning.layout import Layout
from fourfold.planning.predictor import Form, Predictor
from fourfold.planning.ranking import at_best, best_without, forms_of, ranked, speed, with_what_fits, worth
from fourfold.planning.reasons import reason_of
from fourfold.planning.rescues import Rescue, find_rescues
from fourfold.planning.shape import ModelShape
from fourfold.planning.wishes import Wishes

MARGIN = 0.02
"""Share of a device's memory that a layout leaves free; one that needs it is taken only where no other fits."""

_MOST_REFINED = 150
_MOST_RANKED = 12


@dataclass(frozen=True)
class Plan:
    """What is known of a job on a cluster before it runs.

    Attributes:
        wishes: what the config fixed.
        whole: memory of the leanest form on one GPU of this kind.
        single: memory on one GPU as the job asks, nothing computed again that need not be.
        fitting: every layout whose leanest form fits.
        layouts: those that fit, best first (ranking.py).
        without: axis that the best layout uses (`shards` for dp_shard) -> what is best of those that do not use it,
            None if none fits.
        rejected: what was dropped, and why.
        rescues: where nothing fits, the smallest changes after which something does.
    """

    shape: ModelShape
    job: Job
    cluster: Cluster
    wishes: Wishes
    whole: Memory
    single: Memory
    fitting: tuple[Layout, ...]
    layouts: tuple[Estimate, ...]
    rejected: tuple[Rejected, ...]
    rescues: tuple[Rescue, ...] = ()
    without: Mapping[str, Estimate | None] = field(default_factory=dict)

    @property
    def best(self) -> Estimate | None:
        """The layout to take."""
        return self.layouts[0] if self.layouts else None


def search(shape: ModelShape, job: Job, cluster: Cluster, wishes: Wishes | None = None, *, rescue: bool = True) -> Plan:
    """Find the layouts that fit, and rank them.

    Args:
        wishes: what may not be changed; None for nothing.
        rescue: where nothing fits, look for what would.
    Raises:
        PlanError: given sizes that cannot work, or a dtype that the device lacks.
        ConfigError: the checkpoint is quantised, and the job contradicts it.
    """
    wishes = wishes or Wishes()
    cluster.device.peak(job.compute)
    job = job.on(shape.own_bits, shape.own_double_quant)
    layouts, rejected = candidates(shape, job, cluster, wishes)
    predictor = Predictor(shape, job, cluster, wishes)
    single = predictor.memory(Form(Layout(), wishes.recomputes[0], job.micro_batch))
    whole = predictor.memory(Form(Layout(), wishes.recomputes[-1], min(job.micro_batch, job.sequence)))
    for margin in (MARGIN, 0.0):
        limit = int(cluster.device.memory_bytes * (1 - margin))
        fitting, dropped = fitting_layouts(predictor, layouts, limit)
        if fitting:
            break
    found = find_rescues(shape, job, cluster, wishes, MARGIN) if rescue and not fitting else ()
    plan = Plan(shape, job, cluster, wishes, whole, single, tuple(fitting), (), (*rejected, *dropped), found)
    return _ranked(plan, predictor, limit) if fitting else plan


def _ranked(plan: Plan, predictor: Predictor, limit: int) -> Plan:
    """The plan with the best forms of the layouts that fit, best first, and the layouts that are slower."""
    fitting, whole = plan.fitting, plan.whole
    hopes = {layout: at_best(predictor, layout) for layout in fitting}
    order = sorted(fitting, key=lambda layout: (-worth(predictor, hopes[layout]), simplicity(layout)))
    found: dict[Layout, list[Form]] = {}
    worths: list[float] = []
    for layout in order[:_MOST_REFINED]:
        if len(worths) >= _MOST_RANKED and worth(predictor, hopes[layout]) < sorted(worths)[-_MOST_RANKED]:
            break
        found[layout] = forms_of(predictor, layout, limit)
        worths.append(worth(predictor, found[layout][0]))
    best = ranked(predictor, [forms[0] for forms in found.values()])[:_MOST_RANKED]
    others = ranked(predictor, [form for forms in found.values() for form in forms[1:]])
    best = best + others[: _MOST_RANKED - len(best)]
    best = ranked(predictor, [with_what_fits(predictor, form, limit) for form in best])
    without: dict[str, Estimate | None] = {}
    for axis in axes_in_use(best[0].layout):
        rest = [layout for layout in fitting if axis not in axes_in_use(layout)]
        form = best_without(predictor, rest, limit, found)
        form = None if form is None else with_what_fits(predictor, form, limit)
        without[axis] = None if form is None else _estimate(predictor, form, whole, {})
    estimates = tuple(_estimate(predictor, form, whole, {} if i else without) for i, form in enumerate(best))
    named = {_sizes(form.layout) for form in best}
    left = [layout for layout in order if _sizes(layout) not in named]
    slower = _slower(predictor, left, hopes, estimates)
    return replace(plan, layouts=estimates, rejected=(*plan.rejected, *slower), without=without)


def _estimate(predictor: Predictor, form: Form, whole: Memory, without: Mapping[str, Estimate | None]) -> Estimate:
    memory, cost, job = predictor.memory(form), predictor.cost(form), predictor.job_of(form)
    found = Estimate(
        form.layout,
        form.recompute,
        form.micro_batch,
        memory,
        cost,
        engine=job.engine,
        keeps=form.keeps,
    )
    kept = predictor.memory(replace(form, recompute="none", keeps=Keeps(unpacked=form.keeps.unpacked)))
    reason = reason_of(found, predictor.shape, job, predictor.cluster, whole, kept, without)
    return replace(found, reason=reason)


def _slower(
    predictor: Predictor, layouts: Sequence[Layout], hopes: Mapping[Layout, Form], ranked: Sequence[Estimate]
) -> tuple[Rejected, ...]:
    """Layouts that fit and are not ranked, by the axes that they use."""
    groups: dict[str, list[Layout]] = {}
    for layout in layouts:
        groups.setdefault(axes_of(layout), []).append(layout)
    best = ranked[0].cost.tokens_per_s if ranked else 1.0
    rejected = []
    for axes, group in groups.items():
        top = max(group, key=lambda layout: speed(predictor, hopes[layout]))
        share = speed(predictor, hopes[top]) / best
        what = name_of(top) if len(group) == 1 else f"{axes} ({len(group)} layouts)"
        of = "" if len(group) == 1 else f" ({name_of(top)})"
        if share < 0.995:
            rejected.append(
                Rejected(what, f"slower: at best {share:.0%} of the first one's tokens/s{of}", axes=used_axes(top))
            )
        else:
            rejected.append(Rejected(what, f"slower in the form that fits{of}", axes=used_axes(top)))
    return tuple(rejected)


def _sizes(layout: Layout) -> tuple[int, ...]:
    return tuple(layout.sizes().values())
