"""Tokenising and packing instructions: Fourfold's dataset path beside `datasets.map` as LLaMA-Factory uses it.

    python benchmarks/data_speed.py [--rows 1000000] [--workers 2] [--sides fourfold,datasets_map]
                                    [--work FOLDER] [--out FOLDER]

Made-up rows of the lengths of alpaca's, of words of SmolLM2's vocabulary as frequent as words are, in a .jsonl file.
Both sides read the file, tokenise it with SmolLM2's template and tokenizer, cut at 2,048 tokens, pack 1,000 rows at a
time and store the result, without a cache from before. Each is a process with its workers; the rows are made before.
Time is from the first look at the file to the data set that can be trained on (imports aside); memory is that of all
its processes together, shared pages counted once (PSS), four times a second; processor time is theirs too, imports
included, and the figure to compare on a machine that does other work. Both must come to the same packs and trained
tokens. Figures are merged into OUT/data_speed.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from environment import environment
from instruction_rows import save_smollm2_tokenizer, write_instructions

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
SIDES = ("fourfold", "datasets_map")
_SAME = ("packs", "targets")


class MemoryWatch(threading.Thread):
    """Notes the largest memory of a process and all below it.

    Attributes:
        proportional: bytes, each shared page divided among those that share it (PSS).
        resident: bytes, the sum of resident sets, in which shared pages count several times.
    """

    def __init__(self, pid: int, interval_s: float = 0.25) -> None:
        super().__init__(daemon=True)
        self.proportional = self.resident = 0
        self._process, self._interval_s = psutil.Process(pid), interval_s

    def run(self) -> None:
        """Look until the process is gone."""
        while self._process.is_running() and self._process.status() != psutil.STATUS_ZOMBIE:
            proportional = resident = 0
            for process in (self._process, *self._process.children(recursive=True)):
                try:
                    found = process.memory_full_info()
                except psutil.Error:
                    continue
                proportional += getattr(found, "pss", found.rss)  # of Linux only
                resident += found.rss
            self.proportional = max(self.proportional, proportional)
            self.resident = max(self.resident, resident)
            time.sleep(self._interval_s)


def measure(side: str, rows: int, workers: int, work: Path) -> dict[str, Any]:
    """Run one side in a process of its own."""
    scratch, result = work / f"scratch-{side}", work / "result.json"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    script = Path(__file__).with_name("data_sides.py")
    command = [sys.executable, str(script), side, str(_file(work, rows)), str(work / "tokenizer"), str(workers)]
    env = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    env |= {"FOURFOLD_CACHE": str(scratch), "HF_DATASETS_CACHE": str(scratch), "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    started, used = time.perf_counter(), _processor_s()
    process = subprocess.Popen([*command, str(result)], env=env)
    watch = MemoryWatch(process.pid)
    watch.start()
    status = process.wait()
    if status != 0:
        raise SystemExit(f"{side}: exit status {status}")
    stored = sum(path.stat().st_size for path in scratch.rglob("*") if path.is_file())
    shutil.rmtree(scratch)
    found = json.loads(result.read_text(encoding="utf-8"))
    return {
        "rows": rows,
        "workers": workers,
        "rows_per_sec": rows / found["seconds"],
        "process_s": time.perf_counter() - started,
        "processor_s": _processor_s() - used,
        "peak_gib": watch.proportional / GIB,
        "peak_resident_gib": watch.resident / GIB,
        "stored_gib": stored / GIB,
        **found,
        "environment": environment(),
    }


def _processor_s() -> float:
    """Seconds of all processes that were started from here and have ended, and of those that these had started."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _file(work: Path, rows: int) -> Path:
    return work / f"rows-{rows}" / "instructions.jsonl"


def show(side: str, found: dict[str, Any]) -> None:
    """Print the figures in a line."""
    times = (
        f"{found['seconds']:.1f} s ({found['process_s']:.1f} s with imports)  processors {found['processor_s']:.1f} s"
    )
    memory = f"peak {found['peak_gib']:.2f} GiB (resident sets {found['peak_resident_gib']:.2f})"
    made = f"{found['packs']:,} packs, {found['targets']:,} trained tokens, {found['stored_gib']:.2f} GiB stored"
    print(f"{side:14} {found['rows_per_sec']:>9,.0f} rows/s  {times}  {memory}  {made}", flush=True)


def compare(results: dict[str, dict[str, Any]]) -> bool:
    """Print how the sides compare; false if they did not make the same."""
    if not all(side in results for side in SIDES):
        return True
    ours, theirs = (results[side] for side in SIDES)
    ratio, memory = ours["rows_per_sec"] / theirs["rows_per_sec"], theirs["peak_gib"] / ours["peak_gib"]
    processors = theirs["processor_s"] / ours["processor_s"]
    print(
        f"fourfold: {ratio:.2f} times the speed, 1/{processors:.2f} of the processor time, 1/{memory:.2f} of the memory"
    )
    different = [key for key in _SAME if ours[key] != theirs[key]]
    for key in different:
        print(f"{key}: {ours[key]:,} and {theirs[key]:,} differ")
    return not different


def main(words: Sequence[str] | None = None) -> None:
    """Measure the chosen sides."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=2, help="processes of each side")
    parser.add_argument("--sides", default=",".join(SIDES), help="separated by commas")
    parser.add_argument("--work", type=Path, help="folder for rows that stay; default: one that does not")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ROOT / "runs" / "benchmarks")))
    args = parser.parse_args(words)
    work = args.work or Path(tempfile.mkdtemp(prefix="fourfold-"))
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        tokenizer = save_smollm2_tokenizer(work / "tokenizer")
        if not _file(work, args.rows).exists():
            started = time.perf_counter()
            write_instructions(_file(work, args.rows), args.rows, tokenizer)
            size = _file(work, args.rows).stat().st_size / GIB
            print(f"{args.rows:,} rows, {size:.2f} GiB, made in {time.perf_counter() - started:.1f} s", flush=True)
        results: dict[str, dict[str, Any]] = {}
        for side in args.sides.split(","):
            results[side] = measure(side, args.rows, args.workers, work)
            show(side, results[side])
    finally:
        if args.work is None:
            shutil.rmtree(work)
    file = args.out / "data_speed.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    known |= {f"{side}/{args.rows}": found for side, found in results.items()}
    file.write_text(json.dumps(known, indent=1), encoding="utf-8")
    sys.exit(0 if compare(results) else 1)


if __name__ == "__main__":
    main()
