"""The four cases that a model and a cluster can be in, and what each axis would do there.

1. The whole training state fits one GPU: replicas. 2. It does not, but the largest layer does: shards, which gather a
layer at a time. 3. A single layer does not: only what splits a matrix helps. 4. The state is more than a node holds,
and there are many layers: stages, whose activations cross nodes well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from fourfold.base.units import GIB
from fourfold.planning.candidates import LONG_SEQUENCE, name_of
from fourfold.planning.estimate import Estimate
from fourfold.planning.flops import local_numel
from fourfold.planning.held import held_by
from fourfold.planning.layout import Layout
from fourfold.planning.reasons import compared, instead
from fourfold.planning.search import Plan
from fourfold.planning.wishes import obstacles

Word = Literal["recommended", "possible", "pointless", "impossible"]

_AROUND = ("activations", "logits", "buffers", "context")
_MANY_LAYERS = 16  # a node's worth of stages, with two layers for each


@dataclass(frozen=True, slots=True)
class Case:
    """One of the four cases.

    Attributes:
        question: what is asked.
        holds: the answer.
        reason: one line with the numbers.
    """

    question: str
    holds: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to think of an axis for this model on this cluster.

    Attributes:
        axis: name for people: DP, FSDP/ZeRO, TP, PP, CP or EP.
        word: recommended, possible, pointless or impossible.
        reason: one line.
    """

    axis: str
    word: Word
    reason: str


@dataclass(frozen=True, slots=True)
class Cases:
    """All answers.

    Attributes:
        cases: the four, in order.
        verdicts: of each axis.
    """

    cases: tuple[Case, ...]
    verdicts: tuple[Verdict, ...]

    def as_json(self) -> dict[str, Any]:
        """`cases` of `fourfold plan --json`."""
        return {
            "cases": [{"case": c.question, "holds": c.holds, "reason": c.reason} for c in self.cases],
            "axes": {v.axis: {"verdict": v.word, "reason": v.reason} for v in self.verdicts},
        }


@dataclass(frozen=True, slots=True)
class Sizes:
    """The bytes that decide.

    Attributes:
        room: of a GPU.
        whole: of the leanest form on one GPU.
        state: of it, weights, gradients and optimizer state.
        layer: of the largest layer with its gradient, gathered whole.
        around: of the leanest form, what neither shards nor stages take away: activations, logits, context.
        matrix: of the largest single matrix.
    """

    room: int
    whole: int
    state: int
    layer: int
    around: int
    matrix: int

    @property
    def fits_whole(self) -> bool:
        """Whether one GPU holds everything."""
        return self.whole <= self.room

    @property
    def fits_layer(self) -> bool:
        """Whether one GPU holds a layer and what is around it."""
        return self.layer + self.around <= self.room


def sizes_of(plan: Plan) -> Sizes:
    """The bytes that decide between the cases.

    FSDP gathers weights in the compute dtype, and a layer's gradient is whole in the same until it is scattered.
    """
    job, whole = plan.job, plan.whole
    weight = {4: 0.5, 8: 1.0}.get(job.bits or 0, float(job.compute_bytes))
    with_gradient = weight + (job.compute_bytes if job.tuning == "full" else 0)
    return Sizes(
        room=plan.cluster.device.memory_bytes,
        whole=whole.device,
        state=held_by(plan.shape, job, Layout()).total,
        layer=int(plan.shape.largest_layer * with_gradient),
        around=sum(whole.terms.get(name, 0) for name in _AROUND),
        matrix=int(plan.shape.largest_matrix.largest_matrix * weight),
    )


def answer_cases(plan: Plan) -> Cases:
    """The four cases and the verdicts for a plan."""
    sizes = sizes_of(plan)
    return Cases(_cases(plan, sizes), tuple(judge(plan, sizes) for judge in _JUDGES))


def _cases(plan: Plan, sizes: Sizes) -> tuple[Case, ...]:
    cluster, layers = plan.cluster, plan.shape.num_layers
    need = f"{_gib(sizes.whole)} at least, and a GPU has {_gib(sizes.room)}"
    layer = f"the largest layer{_gradient(plan)} takes {_gib(sizes.layer)}, beside {_gib(sizes.around)} of activations,"
    layer += " logits and context"
    gpus = "one GPU has" if cluster.domain == 1 else f"{cluster.domain} GPUs joined by {cluster.device.link.kind} have"
    domain = f"{_gib(sizes.state)} of state; {gpus} {_gib(sizes.room * cluster.domain)}"
    spans = cluster.nodes > 1 and sizes.state > sizes.room * cluster.domain and layers >= _MANY_LAYERS
    return (
        Case("The whole fits one GPU", sizes.fits_whole, need),
        Case("The whole does not, but the largest layer does", not sizes.fits_whole and sizes.fits_layer, layer),
        Case("A single layer does not fit", not sizes.fits_layer, f"the largest matrix alone is {_gib(sizes.matrix)}"),
        Case("Very many layers over many nodes", spans, f"{layers} layers, {_nodes(cluster.nodes)}; {domain}"),
    )


def _replicas(plan: Plan, sizes: Sizes) -> Verdict:
    found = _usual(plan, "DP", "dp_replicate")
    if found is not None:
        return found
    best = _with(plan, "dp_replicate")
    if best is not None and best is plan.best:
        groups = f"{best.layout.dp_replicate} replicas"
        whole = f"the whole fits one GPU ({_gib(sizes.whole)} at least)"
        reason = f"{whole}; only gradients are sent, once a step"
        if best.layout.splits_model:
            reason = f"{groups} of groups that share the model; only gradients are sent, once a step"
        return Verdict("DP", "recommended", reason)
    if not sizes.fits_whole:
        reason = f"each replica holds everything: {_gib(sizes.whole)} at least, and a GPU has {_gib(sizes.room)}"
        if best is None:
            return Verdict("DP", "impossible", reason)
        return Verdict(
            "DP", "possible", f"of groups that share the model ({_slower(plan, best, 'dp_replicate')}); {reason}"
        )
    if _may(plan, "dp_replicate"):
        return Verdict("DP", "possible", _slower(plan, best, "dp_replicate"))
    return _left_out(plan, "DP")


def _shards(plan: Plan, sizes: Sizes) -> Verdict:
    found = _usual(plan, "FSDP/ZeRO", "dp_shard")
    if found is not None:
        return found
    best = _with(plan, "shards")
    layer = _gathered(plan, sizes, None if best is None else best.layout)
    if best is not None and best is plan.best:
        job = plan.wishes.job_of(plan.job, best.layout)
        state = _gib(held_by(plan.shape, job, best.layout, best.memory.rank).total)
        reason = f"{best.layout.shards} shards leave {state} of state on each; {layer}{_instead(plan, 'shards')}"
        return Verdict("FSDP/ZeRO", "recommended", reason)
    if best is not None or _may(plan, "dp_shard"):
        if sizes.fits_whole and plan.best is not None and not plan.best.layout.splits_model:
            return Verdict("FSDP/ZeRO", "pointless", f"the whole fits one GPU, and sharing sends more; {layer}")
        return Verdict("FSDP/ZeRO", "possible", f"{_slower(plan, best, 'dp_shard')}; {layer}")
    if not sizes.fits_layer:
        reason = f"{layer}, beside {_gib(sizes.around)} of other things; a GPU has {_gib(sizes.room)}"
        return Verdict("FSDP/ZeRO", "impossible", reason)
    return _too_large(plan, "FSDP/ZeRO", "dp_shard")


def _gathered(plan: Plan, sizes: Sizes, layout: Layout | None) -> str:
    """What FSDP has whole at a time: the largest layer, or what tp and ep leave a rank of it."""
    cuts = [] if layout is None else [f"{axis} {getattr(layout, axis)}" for axis in ("tp", "ep")]
    cuts = [cut for cut in cuts if not cut.endswith(" 1")]
    if layout is None or not cuts:
        return f"a layer is gathered whole, {_gib(sizes.layer)}{_gradient(plan)}"
    numels = [sum(local_numel(weight, plan.shape, layout) for weight in kind.weights) for kind in plan.shape.kinds]
    size = sizes.layer * max(numels) / plan.shape.largest_layer
    return f"what {' and '.join(cuts)} leave of a layer is gathered, {_gib(size)}{_gradient(plan)}"


def _tensor(plan: Plan, sizes: Sizes) -> Verdict:
    found = _usual(plan, "TP", "tp")
    if found is not None:
        return found
    best, link = _with(plan, "tp"), plan.cluster.device.link.kind
    if best is not None and best is plan.best:
        if sizes.fits_layer:
            why = "it divides layers, activations and logits without gathering them"
        else:
            why = f"it alone splits a matrix (the largest is {_gib(sizes.matrix)})"
        return Verdict("TP", "recommended", f"{why}; its ranks are joined by {link}{_instead(plan, 'tp')}")
    if _may(plan, "tp"):
        if link == "pcie":
            reason = "activations travel twice in every layer, forward and backward, and PCIe is slow for that"
            return Verdict("TP", "pointless" if best is None or sizes.fits_layer else "possible", reason)
        if sizes.fits_whole:
            reason = f"no matrix needs splitting (the largest is {_gib(sizes.matrix)}); activations would travel"
            return Verdict("TP", "pointless", f"{reason} in every layer")
        return Verdict("TP", "possible", f"{_slower(plan, best, 'tp')}; activations travel in every layer, over {link}")
    return _too_large(plan, "TP", "tp")


def _pipeline(plan: Plan, sizes: Sizes) -> Verdict:
    found = _usual(plan, "PP", "pp")
    if found is not None:
        return found
    best = _with(plan, "pp")
    if best is not None and best is plan.best:
        sent = f"sends only activations ({best.cost.bytes_sent.get('pp', 0) / 1e9:.1f} GB a step)"
        over = ", which crosses nodes well" if plan.cluster.nodes > 1 else ""
        idle = f"; idles {best.cost.bubble:.0%} of a step"
        return Verdict("PP", "recommended", f"{sent}{over}{idle}{_instead(plan, 'pp')}")
    if not sizes.fits_layer and best is None:
        return Verdict("PP", "pointless", "stages hold whole layers, and a single one is too large")
    if _may(plan, "pp"):
        idle = "" if best is None else f" ({best.cost.bubble:.0%} of a step)"
        if sizes.fits_whole:
            return Verdict("PP", "pointless", f"the whole fits one GPU, and stages would wait for each other{idle}")
        waits = f"; sends only activations, but stages wait for each other{idle}"
        return Verdict("PP", "possible", f"{_slower(plan, best, 'pp')}{waits}")
    return _too_large(plan, "PP", "pp")


def _context(plan: Plan, sizes: Sizes) -> Verdict:
    length = f"sequences have {plan.job.sequence:,} positions"
    found = _usual(plan, "CP", "cp")
    if found is not None:
        return found
    best = _with(plan, "cp")
    if best is not None and best is plan.best:
        share = f"{length}, of which a rank keeps the activations of 1/{best.layout.cp}"
        return Verdict("CP", "recommended", f"{share}{_instead(plan, 'cp')}")
    if plan.job.sequence < LONG_SEQUENCE:
        return Verdict("CP", "pointless", f"{length}; exchanging keys pays from {LONG_SEQUENCE:,} on")
    if _may(plan, "cp"):
        one = f"one takes {_gib(plan.whole.terms.get('activations', 0))} of activations, recomputed"
        return Verdict("CP", "possible", f"{_slower(plan, best, 'cp')}; {length}, {one}")
    return _too_large(plan, "CP", "cp")


def _experts(plan: Plan, sizes: Sizes) -> Verdict:
    shape = plan.shape
    if not shape.experts:
        return Verdict("EP", "impossible", "the model is dense: it has no experts to share")
    found = _usual(plan, "EP", "ep")
    if found is not None:
        return found
    best = _with(plan, "ep")
    share = f"{shape.experts} experts, {shape.experts_per_token} for each token"
    if best is not None and best is plan.best:
        each = shape.experts // best.layout.ep
        what = f"{share}: a rank keeps {each} of a layer, and tokens travel instead"
        return Verdict("EP", "recommended", f"{what}{_instead(plan, 'ep')}")
    if _may(plan, "ep"):
        return Verdict("EP", "possible", f"{_slower(plan, best, 'ep')}; {share}")
    return _too_large(plan, "EP", "ep")


_JUDGES: tuple[Callable[[Plan, Sizes], Verdict], ...] = (_replicas, _shards, _tensor, _pipeline, _context, _experts)


def _usual(plan: Plan, axis: str, name: str) -> Verdict | None:
    """What holds for any axis: one GPU has nothing to split, and some things rule an axis out."""
    if plan.cluster.world_size == 1:
        if plan.best is not None:
            return Verdict(axis, "pointless", "there is one GPU, and it is enough")
        return Verdict(axis, "impossible", "there is only one GPU")
    barred = obstacles(plan.shape, plan.job, plan.wishes)
    if name in barred:
        return Verdict(axis, "impossible", barred[name])
    return None


def _uses(layout_name: str, found: Estimate) -> bool:
    layout = found.layout
    return layout.shards > 1 if layout_name == "shards" else layout.sizes()[layout_name] > 1


def _with(plan: Plan, name: str) -> Estimate | None:
    """The fastest ranked layout that uses an axis (`shards`: that shards, over cp as well)."""
    return next((found for found in plan.layouts if _uses(name, found)), None)


def _may(plan: Plan, name: str) -> bool:
    """Whether any layout that fits uses an axis."""
    return any(layout.sizes()[name] > 1 for layout in plan.fitting)


def _slower(plan: Plan, found: Estimate | None, name: str) -> str:
    """How the fastest layout with an axis compares, ranked or not."""
    if found is None or plan.best is None:
        slower = (entry.reason for entry in plan.rejected if name in entry.axes and entry.device_bytes is None)
        return next(slower, "fits, and is slower than the layouts listed")
    return f"{name_of(found.layout)}: {compared(found, plan.best)}"


def _instead(plan: Plan, axis: str) -> str:
    """What the best layout gains by an axis."""
    found = None if plan.best is None else instead(plan.best, axis, plan.without)
    return "" if found is None else f"; {found}"


def _too_large(plan: Plan, axis: str, name: str) -> Verdict:
    """No layout with this axis fits, or none was looked at."""
    tried = [entry for entry in plan.rejected if name in entry.axes and entry.device_bytes is not None]
    if not tried:
        return _left_out(plan, axis)
    least = min(tried, key=lambda entry: entry.device_bytes or 0)
    return Verdict(axis, "impossible", f"{least.what} {least.reason}")


def _left_out(plan: Plan, axis: str) -> Verdict:
    if plan.wishes.parallel.strategy != "auto":
        return Verdict(axis, "possible", f"left out, since the config says strategy: {plan.wishes.parallel.strategy}")
    fixed = (f"{entry.what} {entry.reason}" for entry in plan.rejected if entry.what.startswith(f"{axis.lower()} "))
    reason = f"no size of it divides both the model and {plan.cluster.world_size} GPUs"
    return Verdict(axis, "impossible", next(fixed, reason))


def _gradient(plan: Plan) -> str:
    return " with its gradient" if plan.job.tuning == "full" else ""


def _nodes(count: int) -> str:
    return "one node" if count == 1 else f"{count} nodes"


def _gib(size: float) -> str:
    gib = size / GIB
    return f"{gib:,.0f} GiB" if gib >= 1000 else f"{gib:.1f} GiB" if gib >= 0.1 else f"{gib * 1024:.0f} MiB"
