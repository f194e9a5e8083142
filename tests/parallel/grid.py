"""Runs the grid: every layout with every family, tuning, packing and stage, against one process.

    python tests/parallel/grid.py [--layouts a,b] [--results FILE] [--minutes N]     run what is missing
    python tests/parallel/grid.py --render docs/parallel-grid.md                     draw the matrix

A line is appended to the results for each cell, with the commit and versions; cells that have passed before are not run
again, so an interrupted grid goes on where it was. All cells of a layout run in the same processes.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(Path(__file__).parent)]

import torch  # noqa: E402
from cells import FAMILIES, LAYOUTS, TUNINGS, Cell, Difference, all_cells, difference  # noqa: E402
from harness import Case, Curve, run_ranks, train  # noqa: E402

from fourfold.parallel.mesh import build_mesh, single  # noqa: E402

RESULTS = ROOT / "docs" / "parallel-grid.jsonl"
_CPU = torch.device("cpu")
_HEAD = """# What trains as one process does

Generated from `parallel-grid.jsonl` by `python tests/parallel/grid.py --render`; `make grid` runs it. Five AdamW steps
at 1e-3 in fp32 on tiny models: losses within 1e-5 (mixtures of experts 5e-5) of one process, gradients of the first
step within 1e-6 of their largest, norms within 1e-3. Each entry stands for four cells: packed and padded rows, stages
`sft` and `pt`; a number tells how many of them passed where not all did, `-` that there is nothing to run (a dense
model has no experts to cut)."""


def references(cells: Sequence[Cell], cache: dict[Case, Curve]) -> dict[Case, Curve]:
    """The curves of one process, each made once."""
    cases = list(dict.fromkeys(cell.reference() for cell in cells if cell.reference() not in cache))
    if cases:
        [found] = run_ranks(1, lambda: {case: train(case, single(_CPU)) for case in cases})
        cache |= found
    return cache


def run_layout(layout: str, cells: Sequence[Cell], expected: dict[Case, Curve]) -> Iterator[tuple[Cell, str, Any]]:
    """Run cells of one layout; yields each with `passed`, `differs` or `failed`, and figures or the error.

    An error leaves ranks that wait for each other, so the rest goes on in new processes.
    """
    left = list(cells)
    while left:
        outcomes = run_ranks(LAYOUTS[layout].world_size, partial(_on_rank, layout, left, expected))
        done = min(len(found) for found, _ in outcomes)
        for number in range(done):
            worst = _worst([found[number] for found, _ in outcomes])
            problem = worst.problem(left[number].family, expected[left[number].reference()])
            yield left[number], "differs" if problem else "passed", asdict(worst)
        if done == len(left):
            return
        errors = [error for _, error in outcomes if error is not None]
        yield left[done], "failed", {"error": next((e for e in errors if "closed by peer" not in e), errors[0])}
        left = left[done + 1 :]


def _on_rank(layout: str, cells: Sequence[Cell], expected: dict[Case, Curve]) -> tuple[list[Difference], str | None]:
    mesh = build_mesh(LAYOUTS[layout], _CPU)
    found: list[Difference] = []
    for cell in cells:
        try:
            found.append(difference(train(cell.case(), mesh), expected[cell.reference()]))
        except Exception as error:
            return found, f"{type(error).__name__}: {error}"[:300]
    return found, None


def _worst(differences: Sequence[Difference]) -> Difference:
    rows = [asdict(one) for one in differences]
    return Difference(**{key: max(row[key] for row in rows) for key in rows[0]})


def read_results(path: Path) -> dict[Cell, dict[str, Any]]:
    """The last line of each cell."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    return {Cell(**row["cell"]): row for row in rows}


def run_grid(path: Path, layouts: Sequence[str], minutes: float) -> bool:
    """Run what has not passed yet; whether everything has passed at the end."""
    end, known = time.monotonic() + 60 * minutes, read_results(path)
    facts = {"commit": _commit(), **{name: importlib.metadata.version(name) for name in ("torch", "transformers")}}
    cache: dict[Case, Curve] = {}
    clean = True
    for layout in layouts:
        wanted = [cell for cell in all_cells() if cell.layout == layout]
        missing = [cell for cell in wanted if known.get(cell, {}).get("verdict") not in ("passed", "refused")]
        to_run = [cell for cell in missing if cell.refusal() is None]
        lines: list[tuple[Cell, str, Any]] = [
            (cell, "refused", {"reason": cell.refusal()}) for cell in missing if cell.refusal() is not None
        ]
        if to_run and time.monotonic() > end:
            print(f"{layout}: no time left for {len(to_run)} cells", flush=True)
            clean = False
            continue
        started = time.monotonic()
        if to_run:
            lines += run_layout(layout, to_run, references(to_run, cache))
        with path.open("a", encoding="utf-8") as file:
            for cell, verdict, figures in lines:
                file.write(json.dumps({"cell": cell.as_dict(), "verdict": verdict, **figures, **facts}) + "\n")
        bad = [(cell, figures) for cell, verdict, figures in lines if verdict in ("failed", "differs")]
        clean = clean and not bad
        print(f"{layout}: {len(to_run)} run, {len(bad)} bad, {time.monotonic() - started:.0f} s", flush=True)
        for cell, figures in bad:
            print(f"  {cell.family} {cell.tuning} {cell.packing} {cell.stage}: {figures}", flush=True)
    return clean


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def render(path: Path) -> str:
    """The matrix as Markdown: for each layout, family and tuning how many of the cells have passed."""
    known = read_results(path)
    rows: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for cell in all_cells():
        rows[cell.layout, cell.family, cell.tuning].append(known.get(cell, {"verdict": "not run"})["verdict"])
    columns = [(family, tuning) for family in FAMILIES for tuning in TUNINGS]
    passed = [row for row in known.values() if row["verdict"] == "passed"]
    lines = [
        *_HEAD.splitlines(),
        "",
        "| layout | " + " | ".join(f"{family} {tuning}" for family, tuning in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for layout in LAYOUTS:
        entries = [_entry(rows[layout, family, tuning]) for family, tuning in columns]
        lines.append(f"| `{layout}` | " + " | ".join(entries) + " |")
    lines += ["", f"{len(passed)} cells passed."]
    for key in ("loss", "norm", "gradient"):
        if passed:
            lines.append(f"Largest difference of a {key}: {max(row[key] for row in passed):.1e}.")
    return "\n".join(lines) + "\n"


def _entry(verdicts: Sequence[str]) -> str:
    if all(verdict == "passed" for verdict in verdicts):
        return "yes"
    if all(verdict == "refused" for verdict in verdicts):
        return "-"
    if all(verdict == "not run" for verdict in verdicts):
        return "not run"
    return f"{sum(verdict == 'passed' for verdict in verdicts)} of {len(verdicts)}"


def main() -> None:
    """Run or draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--layouts", default=",".join(LAYOUTS))
    parser.add_argument("--minutes", type=float, default=1e6, help="start no layout after so many")
    parser.add_argument("--render", type=Path, help="write the matrix to this file and run nothing")
    args = parser.parse_args()
    if args.render is not None:
        args.render.write_text(render(args.results), encoding="utf-8")
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sys.exit(0 if run_grid(args.results, args.layouts.split(","), args.minutes) else 1)


if __name__ == "__main__":
    main()
