"""A plan as a picture: the memory of each layout, term upon term, against what a GPU has."""

from __future__ import annotations

from pathlib import Path

from fourfold.base.errors import PlanError
from fourfold.base.units import GIB
from fourfold.planning.candidates import name_of
from fourfold.planning.estimate import TERMS, Estimate
from fourfold.planning.search import Plan

_COLORS = (
    "#4477aa", "#66ccee", "#228833", "#ccbb44", "#225555", "#ee6677", "#aa3377", "#bbbbbb", "#88ccaa", "#777777",
    "#dddddd",
)  # fmt: skip
_LEAST_HEIGHT_IN, _BAR_IN = 2.5, 0.55


def draw(plan: Plan, file: Path) -> None:
    """Draw stacked bars, the fastest layout on top; of what needs least where nothing fits.

    Raises:
        PlanError: the file cannot be written, or its ending is no format.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bars = [(_title(found), found.memory) for found in plan.layouts] or [("one GPU, leanest", plan.whole)]
    figure = Figure(figsize=(11, _LEAST_HEIGHT_IN + _BAR_IN * len(bars)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    left = [0.0] * len(bars)
    for term, color in zip(TERMS, _COLORS, strict=True):
        sizes = [memory.terms.get(term, 0) / GIB for _, memory in bars]
        axes.barh(range(len(bars)), sizes, left=left, color=color, label=term)
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    limit = plan.cluster.device.memory_gib
    axes.axvline(limit, color="black", linestyle="--", label=f"limit, {limit:.1f} GiB")
    axes.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("GiB on the most loaded GPU")
    axes.set_title(plan.cluster.describe(), fontsize=10)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    try:
        figure.savefig(file, dpi=120)
    except (OSError, ValueError) as error:
        raise PlanError(f"plot: {file} cannot be written ({error}). Name a .png, .svg or .pdf file.") from error


def _title(found: Estimate) -> str:
    return f"{name_of(found.layout)}\n{found.recompute}, {found.micro_batch:,}"
