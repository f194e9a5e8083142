"""The order of layouts: by predicted speed, less what a layout of many axes must be faster to be worth its while.

A prediction of a step's time is off by some per cent, and each axis more is one more thing to understand, to tune and
to fail. So a layout is worth its tokens per second less WORTH_AN_AXIS for each of its burdens; layouts that are then
equal within TIE go by simplicity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from fourfold.planning.candidates import simplicity
from fourfold.planning.estimate import LOADED
from fourfold.planning.hardware import Cluster
from fourfold.planning.job import RECOMPUTES
from fourfold.planning.keeps import NOTHING, Keeps, may_unpack, room_for_step, what_fits
from fourfold.planning.layout import Layout
from fourfold.planning.predictor import Form, Predictor
from fourfold.planning.traffic import strides

TIE = 0.02
"""Worths that differ by less are taken as equal, and the simpler layout goes first: predictions are not better."""

WORTH_AN_AXIS = 0.03
"""Of its speed, what each burden must gain."""

FEW_SHARDS, MANY_SHARDS = 64, 256
"""More ranks than these that meet for every layer are a burden, and another one: all wait for the slowest."""

_MOST_LOOKED_AT = 5

_UNPACKED_SHARE = 0.9
"""Of what a layout may take, what it may with 4-bit weights unpacked: speed alone is no reason to fill a device."""


def burdens(layout: Layout, cluster: Cluster) -> int:
    """How many things a layout asks for beside plain replicas.

    One each for shards, tp, cp and stages; experts cut over ranks that shard are what a mixture of experts asks for
    anyway. Stages count three where the next one is in the same domain: what they spare, sending, is cheap there, and
    their bubble, uneven layers and small micro-batches are not.
    """
    count = (layout.shards > 1) + (layout.tp > 1) + (layout.cp > 1)
    count += (layout.shards > FEW_SHARDS) + (layout.shards > MANY_SHARDS)
    if layout.pp > 1:
        count += 3 if cluster.is_local(layout.pp, strides(layout)["pp"]) else 1
    return count


def speed(predictor: Predictor, form: Form) -> float:
    """Tokens per second over all GPUs."""
    return predictor.cost(form).tokens_per_s


def worth(predictor: Predictor, form: Form) -> float:
    """Tokens per second, less what the layout's burdens must gain."""
    return speed(predictor, form) * (1 - WORTH_AN_AXIS) ** burdens(form.layout, predictor.cluster)


def ranked(predictor: Predictor, forms: Iterable[Form]) -> list[Form]:
    """Forms by worth in steps of TIE down from the best; within a step those of few burdens, then simple ones."""
    forms = list(forms)
    most = max((worth(predictor, form) for form in forms), default=1.0)

    def key(form: Form) -> tuple[float | int, ...]:
        step = int(math.log(most / worth(predictor, form)) / math.log1p(TIE))
        work = ("none", "selective", "full").index(form.recompute)
        least = burdens(form.layout, predictor.cluster)
        return (step, least, *simplicity(form.layout), work, -form.micro_batch)

    return sorted(forms, key=key)


def at_best(predictor: Predictor, layout: Layout) -> Form:
    """The form of a layout that would be the fastest if memory did not matter."""
    sizes, kind = predictor.micro_batches(layout), predictor.recomputes(layout)[0]
    # a pipeline's bubble is smaller with smaller micro-batches
    tried = {sizes[0], sizes[-1]} if layout.pp > 1 else {sizes[0]}
    lean = _stages_of_zero(predictor, layout)[0]
    forms = (_keeping(predictor, Form(lean, kind, size), lambda _: True) for size in sorted(tried))
    return max(forms, key=lambda form: speed(predictor, form))


def forms_of(predictor: Predictor, layout: Layout, limit: int) -> list[Form]:
    """The forms of a layout that fit and that no other is sure to beat, best first; at least the leanest one.

    Less is sent with less sharding, and less is computed with less recomputing; both take memory.
    """
    found: list[Form] = []
    sizes = predictor.micro_batches(layout)
    for variant in _stages_of_zero(predictor, layout):
        for kind in predictor.recomputes(variant):
            fits = [size for size in sizes if predictor.memory(Form(variant, kind, size)).device <= limit]
            kept = fits if layout.pp > 1 or layout.world_size == 1 else fits[:1]
            found += [_unpacked_if_it_fits(predictor, Form(variant, kind, size), limit) for size in kept]
            if fits and fits[0] == sizes[0]:
                break
        else:
            continue
        if kind == predictor.recomputes(variant)[0]:
            break  # nothing is left to gain by more sharding
    return ranked(predictor, found or [predictor.leanest(layout)])


def with_what_fits(predictor: Predictor, form: Form, limit: int) -> Form:
    """A form that keeps what a run finds room for; where `recompute` is given, no layer is spared."""
    plain = replace(form, keeps=NOTHING)
    loaded = sum(predictor.memory(plain).terms[name] for name in LOADED)
    most = min(limit, loaded + room_for_step(predictor.cluster.device.memory_bytes - loaded))
    return _keeping(predictor, plain, lambda form: predictor.memory(form).device <= most)


def _keeping(predictor: Predictor, plain: Form, fits: Callable[[Form], bool]) -> Form:
    """A form that keeps all with which it fits."""
    keeps = what_fits(
        predictor.job_of(plain),
        plain.layout,
        plain.recompute,
        plain.micro_batch,
        predictor.shape.num_layers,
        lambda keeps: fits(replace(plain, keeps=keeps)),
        spares=predictor.wishes.recomputes == RECOMPUTES,
    )
    return replace(plain, keeps=keeps)


def _unpacked_if_it_fits(predictor: Predictor, form: Form, limit: int) -> Form:
    """A form with its 4-bit weights unpacked once, where there is ample room beside what it takes anyway."""
    if not may_unpack(predictor.job, form.layout):
        return form
    unpacked = replace(form, keeps=Keeps(unpacked=True))
    return unpacked if predictor.memory(unpacked).device <= _UNPACKED_SHARE * limit else form


def best_without(
    predictor: Predictor, layouts: Sequence[Layout], limit: int, found: dict[Layout, list[Form]]
) -> Form | None:
    """The best form of several layouts, of which some were looked at and the most hopeful others are now."""
    unseen = [layout for layout in layouts if layout not in found]
    unseen.sort(key=lambda layout: -worth(predictor, at_best(predictor, layout)))
    forms = [found[layout][0] for layout in layouts if layout in found]
    forms += [forms_of(predictor, layout, limit)[0] for layout in unseen[:_MOST_LOOKED_AT]]
    return next(iter(ranked(predictor, forms)), None)


def _stages_of_zero(predictor: Predictor, layout: Layout) -> list[Layout]:
    """The layout with every ZeRO stage that may be used, least sent first."""
    named = predictor.wishes.parallel.strategy != "auto"
    if named or layout.shards == 1 or layout.pp > 1 or layout.reshard is not None or layout.offload == "params":
        return [layout]
    return [replace(layout, zero=stage) for stage in (1, 2, 3)]
