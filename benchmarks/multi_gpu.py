"""The layouts on the 2, 4 or 8 GPUs of one machine, through NCCL; or, tried out, on CPU processes through gloo.

    python benchmarks/multi_gpu.py [--only links,throughput,...] [--budget SECONDS] [--out FOLDER] [--known FILE]
    python benchmarks/multi_gpu.py --tiny --gpus 2              # everything, on any machine
    python benchmarks/multi_gpu.py --check | --list | --predict

links        rates and latencies of collectives, and a hardware file for the planner        (multi_links.py)
throughput   speed, peak memory of each rank, bubbles, beside what the planner says         (multi_throughput.py)
equality     losses of every layout against one GPU's, fp32 and bf16, full, LoRA and QLoRA  (multi_equality.py)
kill         `fourfold train` whose worker is killed, and goes on with half as many         (multi_faults.py)
resume       a checkpoint of all GPUs on fewer                                              (multi_faults.py)
command      `fourfold train` by strategy: losses and speed                                 (multi_faults.py)

A call ends within its budget. Rows are written into FOLDER/multi_gpu.json one by one; a later call leaves out what is
there, in the file itself or in those that `--known` names. Tables: multi_layouts.py and
multi_speeds.py; verdicts: multi_check.py.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import multi_faults
from environment import environment
from fourfold.planning.detect import detect
from multi_check import verdicts
from multi_job import Plan, run_job
from multi_layouts import equality_cases
from multi_results import FILE, Results, is_failure, line_of
from multi_speeds import SPEEDS, speed_cases

POINTS = ("links", "throughput", "equality", "kill", "resume", "command")
_IN_A_JOB = ("links", "throughput", "equality")
_SECONDS = {"links": 25.0, "equality": 5.0, "kill": 110.0, "resume": 75.0, "command": 35.0}
_TINY_SECONDS = 10.0


def cases_of(point: str, ranks: int) -> list[str]:
    """Names of a point's cases."""
    tables: dict[str, Callable[[], list[str]]] = {
        "links": lambda: [f"links/{ranks}"],
        "throughput": lambda: speed_cases(ranks),
        "equality": lambda: equality_cases(ranks),
        "kill": lambda: [f"kill/{ranks}"],
        "resume": lambda: [f"resume/{ranks}"],
        "command": lambda: [f"command/{ranks}/{name}" for name in multi_faults.COMMANDS],
    }
    return tables[point]()


def seconds_of(name: str, *, is_tiny: bool) -> float:
    """What a case is expected to take."""
    kind = name.split("/")[0]
    if is_tiny:
        return _TINY_SECONDS
    return SPEEDS[name.split("/")[2]].seconds if kind == "throughput" else _SECONDS[kind]


def run_command(name: str, bench: multi_faults.Bench) -> dict[str, Any]:
    """A case that starts `fourfold train`; a failure is a row, too."""
    kind, *rest = name.split("/")
    started = time.perf_counter()
    try:
        if kind == "command":
            row = multi_faults.command(bench, rest[1])
        else:
            row = multi_faults.kill(bench) if kind == "kill" else multi_faults.resume(bench)
    except (RuntimeError, OSError, LookupError, ValueError):
        row = {"error": traceback.format_exc()[-3000:]}
    return {**row, "seconds": time.perf_counter() - started}


def run_points(args: argparse.Namespace, results: Results) -> None:
    """Run what is missing, until all is done or the budget is spent."""
    deadline = args.started + args.budget - 3.0
    facts = {"environment": environment(), "gpu": args.gpu, "ranks": args.gpus, "is_tiny": args.tiny}
    call = results.begin_call(facts)
    known = results.done(failed_too=not args.retry)
    with tempfile.TemporaryDirectory(prefix="fourfold-") as folder:
        for points in _grouped(args.only.split(",")):
            names = [name for point in points for name in cases_of(point, args.gpus) if _asked(name, args)]
            names = [name for name in names if name not in known]
            seconds = {name: seconds_of(name, is_tiny=args.tiny) for name in names}
            if points[0] in _IN_A_JOB:
                plan = Plan(tuple(names), str(results.file), folder, call, deadline, seconds, args.tiny, args.profile)
                run_job(plan, args.gpus, Path(__file__))
                continue
            bench = multi_faults.Bench(Path(folder), args.gpus, args.tiny, deadline)
            for name in names:
                if time.time() + seconds[name] < deadline:
                    row = run_command(name, bench)
                    print(line_of(name, row), flush=True)
                    if is_failure(row):
                        print(row["error"], file=sys.stderr, flush=True)
                    if not is_failure(row) or time.time() < deadline:  # else it was cut short
                        results.put(name, row, call)


def _grouped(points: list[str]) -> list[list[str]]:
    """Points that follow each other and run in one job, together; all others alone."""
    groups: list[list[str]] = []
    for point in points:
        if groups and point in _IN_A_JOB and groups[-1][0] in _IN_A_JOB:
            groups[-1].append(point)
        else:
            groups.append([point])
    return groups


def _asked(name: str, args: argparse.Namespace) -> bool:
    return not args.cases or any(text in f"{name}$" for text in args.cases.split(","))


def predict_again(results: Results) -> None:
    """Write anew what is predicted of the rows of `throughput`, and print them."""
    from multi_predict import predict  # heavy, and for this alone

    for name, row in results.rows().items():
        if name.startswith("throughput/") and not is_failure(row) and not row["is_tiny"]:
            links = results.rows().get(f"links/{name.split('/')[1]}")
            row = {key: value for key, value in row.items() if not key.startswith("predicted")}
            row |= predict(row, results.gpu_of(row), links)
            results.put(name, row, row["call"])
            print(line_of(name, row), flush=True)


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(POINTS), help="points in this order, separated by commas")
    parser.add_argument(
        "--cases", default="", help="of them those whose name has one of these, separated by commas; $ is its end"
    )
    parser.add_argument("--budget", type=float, default=600.0, help="seconds after which the call has ended")
    parser.add_argument("--gpus", type=int, choices=(2, 4, 8), help="default: all that there are")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "runs/benchmarks")))
    parser.add_argument("--known", type=Path, action="append", default=[], help="results of earlier calls")
    parser.add_argument("--retry", action="store_true", help="run again what has failed")
    parser.add_argument("--tiny", action="store_true", help="shapes for CPUs")
    parser.add_argument("--profile", action="store_true", help="trace one more step of `throughput` on rank 0")
    parser.add_argument("--list", action="store_true", help="print the cases and what they are expected to take")
    parser.add_argument("--check", action="store_true", help="judge the results; exit code 1 if any fails")
    parser.add_argument("--predict", action="store_true", help="predict the results of throughput anew")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    unknown = set(args.only.split(",")) - set(POINTS)
    if unknown:
        parser.error(f"--only: there is no {', '.join(sorted(unknown))}. Use {', '.join(POINTS)}.")
    args.started = time.time()
    if args.worker is None:
        args.gpu, count = (None, 0) if args.tiny else _gpus()
        args.gpus = args.gpus or count or 2
        if args.gpus > count and not (args.tiny or args.list or args.check or args.predict):
            parser.error(f"--gpus: {args.gpus} are asked for, and there are {count}. Use --tiny to try it on CPUs.")
    return args


def _gpus() -> tuple[str | None, int]:
    """The name of this machine's GPUs and how many there are, by the driver's tool, or by torch where there is none."""
    found = detect()
    if found is not None:
        return found.device.name, found.per_node
    import torch  # takes seconds

    count = torch.cuda.device_count()
    return (torch.cuda.get_device_name() if count else None), count


def main() -> None:
    """Run, list, predict or judge."""
    args = parse_arguments()
    if args.worker is not None:
        from multi_worker import work  # heavy, and for ranks only

        work(args.worker)
        return
    if args.list:
        for point in args.only.split(","):
            for name in cases_of(point, args.gpus):
                note = SPEEDS[name.split("/")[2]].note if point == "throughput" else ""
                print(f"{seconds_of(name, is_tiny=args.tiny):6.0f} s  {name:60} {note}")
        return
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that ranks are ended, too
    results = Results(args.out / FILE)
    for file in args.known:
        results.take_in(file)
    if args.predict:
        predict_again(results)
    elif not args.check:
        run_points(args, results)
    if args.check:
        found = list(verdicts(results.rows()))
        print(*found, sep="\n")
        failed = sum(not verdict.passed for verdict in found)
        print(f"{len(found) - failed} of {len(found)} passed")
        sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
