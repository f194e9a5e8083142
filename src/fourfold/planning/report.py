"""A plan as text for a terminal of 80 columns, and as one JSON object."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from fourfold.base.units import GIB, format_count
from fourfold.planning.anatomy import anatomy_of
from fourfold.planning.candidates import name_of
from fourfold.planning.cases import answer_cases
from fourfold.planning.config_lines import config_lines, config_of
from fourfold.planning.engines import STEPS_TO_PAY
from fourfold.planning.estimate import TERMS, Estimate
from fourfold.planning.job import RECOMPUTES
from fourfold.planning.predictor import Form
from fourfold.planning.search import MARGIN, Plan

WIDTH = 80
_MOST_ROWS = 8
_MOST_COLUMNS = 5
_MOST_REJECTED = 12


def as_json(plan: Plan) -> dict[str, Any]:
    """One object: anatomy, cases, layouts, best, rejected and config; and changes where nothing fits."""
    layouts = [found.as_json() for found in plan.layouts]
    found: dict[str, Any] = {
        "anatomy": anatomy_of(plan).as_json(),
        "cases": answer_cases(plan).as_json(),
        "layouts": layouts,
        "best": layouts[0] if layouts else None,
        "rejected": [entry.as_json() for entry in plan.rejected],
        "config": best_config(plan) or {},
    }
    if not layouts:
        found["changes"] = [rescue.as_json() for rescue in plan.rescues]
    return found


def best_config(plan: Plan) -> dict[str, Any] | None:
    """The keys that make a config run the best layout; None if nothing fits."""
    best = plan.best
    if best is None:
        return None
    # what hangs on whether layers are compiled, and on what is free, is left to the run
    free = plan.wishes.recomputes == RECOMPUTES and (best.engine != "eager" or best.keeps.spared > 0)
    return config_of(Form(best.layout, best.recompute, best.micro_batch), plan.wishes, recompute=not free)


def as_text(plan: Plan) -> str:
    """The report: anatomy, cases, ranked layouts, what was dropped, the lines for the config."""
    parts = [_anatomy(plan), _cases(plan)]
    if plan.layouts:
        parts += [_ranking(plan), _memory(plan), _rejected(plan), _config(plan)]
    else:
        parts += [_rejected(plan), _changes(plan)]
    return "\n\n".join("\n".join(part) for part in parts)


def _anatomy(plan: Plan) -> Iterator[str]:
    found, job = anatomy_of(plan), plan.job
    yield "ANATOMY"
    active = f", {_billions(found.active)} for each token" if plan.shape.experts else ""
    share = f"{found.trained / found.parameters:.2%}" if found.trained < found.parameters else "all"
    rows = [
        ("layers", format_count(found.layers)),
        ("parameters", f"{format_count(found.parameters)}{active}"),
        *((f"  {kind}", f"{format_count(size)} ({size / found.parameters:.1%})") for kind, size in _kinds(plan)),
        ("trained", f"{format_count(found.trained)} ({share}, {_tuning(plan)})"),
        ("largest layer", format_count(found.largest_layer)),
        ("largest matrix", f"{_shape(plan)}, {found.largest_matrix.name}"),
    ]
    yield from _table(rows)
    sequences = f"{job.micro_batch:,} positions"
    yield from _wrapped(f"Held on one device, nothing split, with a micro-batch of {sequences}:")
    held = found.bytes_of
    yield from _table([(f"  {name}", f"{held[name] / GIB:,.2f} GiB") for name in held])


def _kinds(plan: Plan) -> list[tuple[str, int]]:
    return [(kind, size) for kind, size in plan.shape.by_kind.items()]


def _shape(plan: Plan) -> str:
    sizes = plan.shape.largest_matrix.shape
    return " x ".join(f"{size:,}" for size in sizes[-2:])


def _tuning(plan: Plan) -> str:
    job = plan.job
    words = {
        "full": "full tuning",
        "freeze": f"last {job.trained_layers} layers",
        "lora": f"LoRA of rank {job.lora_rank}",
    }
    return words[job.tuning] + (f" on {job.bits} bits{_packed_share(plan)}" if job.bits else "")


def _packed_share(plan: Plan) -> str:
    """Where most weights are not those of linear layers, which alone are packed: stacked experts are not."""
    share = sum(weight.numel for weight in plan.shape.weights() if weight.linear) / plan.shape.numel
    return f", for {share:.0%} of the weights: experts stay plain" if plan.shape.experts and share < 0.5 else ""


def _cases(plan: Plan) -> Iterator[str]:
    found = answer_cases(plan)
    yield f"THE FOUR CASES on {plan.cluster.describe()}" if len(plan.cluster.describe()) < 60 else "THE FOUR CASES"
    for case in found.cases:
        yield from _wrapped(
            f"{case.question}: {case.reason}", first="  yes  " if case.holds else "  no   ", rest=" " * 7
        )
    yield ""
    for verdict in found.verdicts:
        yield from _wrapped(verdict.reason, first=f"  {verdict.axis:<10}{verdict.word:<13}", rest=" " * 25)


def _ranking(plan: Plan) -> Iterator[str]:
    limit = plan.cluster.device.memory_gib
    yield f"LAYOUTS, best first ({limit:.1f} GiB a GPU, {MARGIN:.0%} kept free where possible)"
    shown = plan.layouts[:_MOST_ROWS]
    figures = f"{'recompute':<12}{'micro':>7}{'GiB':>6}{'s/step':>7}{'tok/s':>8}{'MFU':>4}{'idle':>5}"
    yield f"{'#':>2} {'layout':<28}{figures}"
    for number, found in enumerate(shown, start=1):
        name = textwrap.wrap(name_of(found.layout), 27) or [""]
        yield f"{number:>2} {name[0]:<28}{_figures(found, plan.shape.num_layers)}"
        yield from (f"   {line}" for line in name[1:])
    if len(plan.layouts) > len(shown):
        yield f"   and {len(plan.layouts) - len(shown)} more with --json"
    yield ""
    yield from _wrapped(f"{shown[0].reason}.", first="Why 1: ", rest="       ")
    fast = [str(number) for number, found in enumerate(shown, start=1) if found.engine != "eager"]
    if fast:
        lines = f"Lines {', '.join(fast)} are" if len(fast) > 1 else f"Line {fast[0]} is"
        by_default = (
            f" That is the default from {STEPS_TO_PAY} steps on; for a shorter run plan with torch_compile=false."
            if plan.wishes.compiles_by_default
            else ""
        )
        yield from _wrapped(f"{lines} reckoned with compiled decoder layers (torch_compile).{by_default}")


def _figures(found: Estimate, num_layers: int) -> str:
    cost = found.cost
    recompute: str = found.recompute
    if found.keeps.spared:
        recompute = f"{recompute.replace('selective', 'sel.')} {num_layers - found.keeps.spared}/{num_layers}"
    return (
        f"{recompute:<12}{found.micro_batch:>7}{found.memory.device / GIB:>6.1f}{_number(cost.step_s):>7}"
        f"{_thousands(cost.tokens_per_s):>8}{cost.mfu * 100:>3.0f}%{cost.bubble * 100:>4.0f}%"
    )


def _memory(plan: Plan) -> Iterator[str]:
    """Terms of the most loaded GPU of the first layouts, and what a GPU sends in a step."""
    shown = plan.layouts[:_MOST_COLUMNS]
    yield "MEMORY of the most loaded GPU, GiB; and what a GPU sends in a step, GB"
    yield f"{'':<16}" + "".join(f"{f'#{number}':>10}" for number in range(1, len(shown) + 1))
    for term in TERMS:
        if term == "teacher" and plan.job.teacher is None:
            continue
        yield f"{term:<16}" + "".join(f"{found.memory.terms.get(term, 0) / GIB:>10.2f}" for found in shown)
    for name in ("allocated", "reserved", "device"):
        yield f"= {name:<14}" + "".join(f"{getattr(found.memory, name) / GIB:>10.2f}" for found in shown)
    for axis in _axes_sent(shown):
        yield f"sent, {axis:<10}"[:16].ljust(16) + "".join(_sent(found, axis) for found in shown)


def _axes_sent(shown: Sequence[Estimate]) -> list[str]:
    return list(dict.fromkeys(axis for found in shown for axis, size in found.cost.bytes_sent.items() if size))


def _sent(found: Estimate, axis: str) -> str:
    size = found.cost.bytes_sent.get(axis, 0) / 1e9
    return f"{_number(size) if size else '-':>10}"


def _rejected(plan: Plan) -> Iterator[str]:
    yield "DROPPED"
    if not plan.rejected:
        yield "  nothing"
    for entry in plan.rejected[:_MOST_REJECTED]:
        yield from _wrapped(f"{entry.what}: {entry.reason}", first="  ", rest="    ")
    if len(plan.rejected) > _MOST_REJECTED:
        yield f"  and {len(plan.rejected) - _MOST_REJECTED} more with --json"


def _config(plan: Plan) -> Iterator[str]:
    yield "CONFIG: the lines for the first layout (--write puts them into the file)"
    keys = best_config(plan)
    assert keys is not None
    yield from (f"  {line}" for line in config_lines(keys))


def _changes(plan: Plan) -> Iterator[str]:
    yield f"NOTHING FITS {plan.cluster.device.memory_gib:.1f} GiB. What would, each change by itself:"
    for rescue in plan.rescues:
        text = f"{rescue.change}: {rescue.device_bytes / GIB:.1f} GiB a GPU ({name_of(rescue.form.layout)})"
        yield from _wrapped(text, first="  - ", rest="    ")
    if not plan.rescues:
        yield "  No single change was found. Use a smaller model, or GPUs with more memory."


def _table(rows: Sequence[tuple[str, str]]) -> Iterator[str]:
    width = max(len(name) for name, _ in rows) + 2
    for name, value in rows:
        yield from _wrapped(value, first=f"  {name:<{width}}", rest=" " * (width + 2))


def _wrapped(text: str, *, first: str = "", rest: str = "") -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=rest, break_long_words=True)


def _billions(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e9 else f"{number / 1e6:.1f} million"


def _thousands(number: float) -> str:
    return f"{number / 1e6:.2f}M" if number >= 1e6 else f"{number / 1e3:.0f}k" if number >= 1e5 else f"{number:.0f}"


def _number(value: float) -> str:
    """Three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
