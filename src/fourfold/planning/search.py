"""The search: which layouts of a job fit a cluster, ranked by predicted speed, and what would fit where none does.

Predicting is cheap but not free, so layouts are dropped early: first by a bound on what weights, gradients and
optimizer state take, then by the memory of each layout's leanest form (everything recomputed, one sequence at a
time). Those that are left are looked at in the order of what they could do at best, until no other can do better than
those found. All limits count layouts and never seconds, so the same job always gives the same plan.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fourfold.planning.candidates import Rejected, candidates, name_of, simplicity
from fourfold.planning.estimate import Estimate, Memory
from fourfold.planning.fit import axes_of, fitting_layouts, used_axes
from fourfold.planning.hardware import Cluster
from fourfold.planning.job import Job
from fourfold.planning.layout import Layout
from fourfold.planning.predictor import Form, Predictor
from fourfold.planning.reasons import reason_of
from fourfold.planning.rescues import Rescue, find_rescues
from fourfold.planning.shape import ModelShape
from fourfold.planning.wishes import Wishes

MARGIN = 0.02
"""Share of a device's memory that a layout leaves free; one that needs it is taken only where no other fits."""

TIE = 0.02
"""Speeds that differ by less are taken as equal, and the simpler layout goes first: predictions are not better."""

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
        layouts: those that fit, fastest first.
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

    @property
    def best(self) -> Estimate | None:
        """The fastest layout that fits."""
        return self.layouts[0] if self.layouts else None


def search(shape: ModelShape, job: Job, cluster: Cluster, wishes: Wishes | None = None, *, rescue: bool = True) -> Plan:
    """Find the layouts that fit, and rank them.

    Args:
        wishes: what may not be changed; None for nothing.
        rescue: where nothing fits, look for what would.
    Raises:
        PlanError: given sizes that cannot work, or a dtype that the device lacks.
    """
    wishes = wishes or Wishes()
    cluster.device.peak(job.compute)
    layouts, rejected = candidates(shape, job, cluster, wishes)
    predictor = Predictor(shape, job, cluster, wishes)
    single = predictor.memory(Form(Layout(), wishes.recomputes[0], job.micro_batch))
    whole = predictor.memory(Form(Layout(), wishes.recomputes[-1], min(job.micro_batch, job.sequence)))
    for margin in (MARGIN, 0.0):
        limit = int(cluster.device.memory_bytes * (1 - margin))
        fitting, dropped = fitting_layouts(predictor, layouts, limit)
        if fitting:
            break
    estimates, slower = _ranked(predictor, fitting, limit, whole)
    found = find_rescues(shape, job, cluster, wishes, MARGIN) if rescue and not estimates else ()
    return Plan(
        shape, job, cluster, wishes, whole, single, tuple(fitting), estimates, (*rejected, *dropped, *slower), found
    )


def _ranked(
    predictor: Predictor, fitting: Sequence[Layout], limit: int, whole: Memory
) -> tuple[tuple[Estimate, ...], tuple[Rejected, ...]]:
    """The best forms of the layouts that fit, fastest first, and the layouts that are slower."""
    hopes = {layout: _at_best(predictor, layout) for layout in fitting}
    order = sorted(fitting, key=lambda layout: (-hopes[layout], simplicity(layout)))
    found: dict[Layout, list[Form]] = {}
    speeds: list[float] = []
    for layout in order[:_MOST_REFINED]:
        if len(speeds) >= _MOST_RANKED and hopes[layout] < sorted(speeds)[-_MOST_RANKED]:
            break
        found[layout] = _sorted(predictor, _forms(predictor, layout, limit))
        speeds.append(_speed(predictor, found[layout][0]))
    best = _sorted(predictor, [forms[0] for forms in found.values()])[:_MOST_RANKED]
    others = _sorted(predictor, [form for forms in found.values() for form in forms[1:]])
    best = _sorted(predictor, best + others[: _MOST_RANKED - len(best)])
    estimates = tuple(_estimate(predictor, form, whole) for form in best)
    named = {_sizes(form.layout) for form in best}
    return estimates, _slower(predictor, [layout for layout in order if _sizes(layout) not in named], hopes, estimates)


def _estimate(predictor: Predictor, form: Form, whole: Memory) -> Estimate:
    memory, cost = predictor.memory(form), predictor.cost(form)
    found = Estimate(form.layout, form.recompute, form.micro_batch, memory, cost)
    job = predictor.wishes.job_of(predictor.job, form.layout)
    kept = predictor.memory(replace(form, recompute="none"))
    return replace(found, reason=reason_of(found, predictor.shape, job, predictor.cluster, whole, kept))


def _slower(
    predictor: Predictor, layouts: Sequence[Layout], hopes: dict[Layout, float], ranked: Sequence[Estimate]
) -> tuple[Rejected, ...]:
    """Layouts that fit and are not ranked, by the axes that they use."""
    groups: dict[str, list[Layout]] = {}
    for layout in layouts:
        groups.setdefault(axes_of(layout), []).append(layout)
    best = ranked[0].cost.tokens_per_s if ranked else 1.0
    rejected = []
    for axes, group in groups.items():
        top = max(group, key=lambda layout: hopes[layout])
        share = hopes[top] / best
        what = name_of(top) if len(group) == 1 else f"{axes} ({len(group)} layouts)"
        of = "" if len(group) == 1 else f" ({name_of(top)})"
        if share < 0.995:
            rejected.append(
                Rejected(what, f"slower: at best {share:.0%} of the first one's tokens/s{of}", axes=used_axes(top))
            )
        else:
            rejected.append(Rejected(what, f"slower in the form that fits{of}", axes=used_axes(top)))
    return tuple(rejected)


def _at_best(predictor: Predictor, layout: Layout) -> float:
    """Tokens per second if memory did not matter."""
    sizes, kind = predictor.micro_batches(layout), predictor.recomputes(layout)[0]
    # a pipeline's bubble is smaller with smaller micro-batches
    tried = {sizes[0], sizes[-1]} if layout.pp > 1 else {sizes[0]}
    lean = _stages_of_zero(predictor, layout)[0]
    return max(_speed(predictor, Form(lean, kind, size)) for size in tried)


def _forms(predictor: Predictor, layout: Layout, limit: int) -> list[Form]:
    """The forms of a layout that fit and that no other is sure to beat; at least the leanest one.

    Less is sent with less sharding, and less is computed with less recomputing; both take memory.
    """
    found: list[Form] = []
    sizes = predictor.micro_batches(layout)
    for variant in _stages_of_zero(predictor, layout):
        for kind in predictor.recomputes(variant):
            fits = [size for size in sizes if predictor.memory(Form(variant, kind, size)).device <= limit]
            kept = fits if layout.pp > 1 or layout.world_size == 1 else fits[:1]
            found += [Form(variant, kind, size) for size in kept]
            if fits and fits[0] == sizes[0]:
                break
        else:
            continue
        if kind == predictor.recomputes(variant)[0]:
            break  # nothing is left to gain by more sharding
    return found or [predictor.leanest(layout)]


def _stages_of_zero(predictor: Predictor, layout: Layout) -> list[Layout]:
    """The layout with every ZeRO stage that may be used, least sent first."""
    named = predictor.wishes.parallel.strategy != "auto"
    if named or layout.shards == 1 or layout.pp > 1 or layout.reshard is not None or layout.offload == "params":
        return [layout]
    return [replace(layout, zero=stage) for stage in (1, 2, 3)]


def _speed(predictor: Predictor, form: Form) -> float:
    return predictor.cost(form).tokens_per_s


def _sorted(predictor: Predictor, forms: Sequence[Form]) -> list[Form]:
    """Forms by speed in steps of TIE down from the fastest; within a step simple ones first."""
    fastest = max((_speed(predictor, form) for form in forms), default=1.0)

    def key(form: Form) -> tuple[float | int, ...]:
        step = int(math.log(fastest / _speed(predictor, form)) / math.log1p(TIE))
        work = ("none", "selective", "full").index(form.recompute)
        return (step, *simplicity(form.layout), work, -form.micro_batch)

    return sorted(forms, key=key)


def _sizes(layout: Layout) -> tuple[int, ...]:
    return tuple(layout.sizes().values())
