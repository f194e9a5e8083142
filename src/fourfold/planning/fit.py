"""Which layouts fit a device: first by a bound that costs nothing, then by the memory of their leanest form."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fourfold.base.units import GIB
from fourfold.planning.candidates import Rejected, name_of, simplicity
from fourfold.planning.job import Job
from fourfold.planning.layout import Layout
from fourfold.planning.predictor import Predictor
from fourfold.planning.shape import ModelShape

_MOST_LAYOUTS = 2000


def fitting_layouts(
    predictor: Predictor, layouts: Iterable[Layout], limit: int
) -> tuple[list[Layout], tuple[Rejected, ...]]:
    """The layouts whose leanest form fits, and the others by the axes that they use."""
    fitting: list[Layout] = []
    too_large: dict[str, list[Layout]] = {}
    seen = skipped = 0
    for layout in layouts:
        need = least_state_bytes(predictor.shape, predictor.job, layout)
        if need <= limit:
            if seen == _MOST_LAYOUTS:
                skipped += 1
                continue
            seen += 1
            need = _leanest_bytes(predictor, layout)
        if need <= limit:
            fitting.append(layout)
        else:
            too_large.setdefault(axes_of(layout), []).append(layout)
    rejected = [_too_large(group, predictor) for group in too_large.values()]
    if skipped:
        many = f"{skipped} layouts of many axes"
        rejected.append(Rejected(many, f"not looked at: the {_MOST_LAYOUTS} simplest that may fit were"))
    return fitting, tuple(rejected)


def _leanest_bytes(predictor: Predictor, layout: Layout) -> int:
    return predictor.memory(predictor.leanest(layout)).device


def _too_large(group: Sequence[Layout], predictor: Predictor) -> Rejected:
    """The layout of a group that needs the least; those whose bound is above what was found need not be looked at."""
    bounds = {layout: least_state_bytes(predictor.shape, predictor.job, layout) for layout in group}
    least: tuple[int, Layout] | None = None
    for layout in sorted(group, key=lambda layout: (bounds[layout], simplicity(layout))):
        if least is not None and bounds[layout] >= least[0]:
            break
        need = _leanest_bytes(predictor, layout)
        if least is None or need < least[0]:
            least = need, layout
    assert least is not None
    need, layout = least
    what = name_of(layout) if len(group) == 1 else f"{axes_of(layout)} ({len(group)} layouts)"
    text = f"{need / GIB:.1f} GiB" if len(group) == 1 else f"at least {need / GIB:.1f} GiB ({name_of(layout)})"
    room = predictor.cluster.device.memory_gib
    return Rejected(what, f"needs {text} on a GPU of {room:.1f} GiB", need, used_axes(layout))


def axes_of(layout: Layout) -> str:
    """The names of the axes larger than one, e.g. `dp_shard x tp`."""
    return " x ".join(used_axes(layout)) or "one process"


def used_axes(layout: Layout) -> tuple[str, ...]:
    """The axes larger than one."""
    return tuple(name for name, size in layout.sizes().items() if size > 1)


def axes_in_use(layout: Layout) -> tuple[str, ...]:
    """What splits the model or a sample: `shards` (of dp_shard, over cp as well), tp, pp, cp, ep."""
    return tuple(name for name in ("shards", "tp", "pp", "cp", "ep") if getattr(layout, name) > 1)


def least_state_bytes(shape: ModelShape, job: Job, layout: Layout) -> int:
    """A bound that no rank's memory can be below: an even share of weights, gradients and optimizer state."""
    if layout.offload == "params":
        return 0
    per_parameter = 0.5 if job.bits == 4 else 1.0 if job.bits == 8 else float(job.compute_bytes)
    if job.tuning == "full":
        moments = 2 * job.master_bytes if job.optim == "adamw_torch" and layout.offload == "none" else 0
        per_parameter = 2 * job.master_bytes + moments
    return int(shape.numel * per_parameter / (layout.tp * layout.pp * layout.shards))
