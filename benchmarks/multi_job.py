"""One job of several ranks that runs case after case in one process group, started and watched from outside.

Starting a process on a machine with GPUs takes 10 to 20 s, so cases share one job. A case that fails or hangs leaves
ranks that wait for each other: then the job is ended, its case is noted as failed, and the rest goes on in a new one.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from multi_results import Results, line_of

CURRENT = "current.json"
"""Which case runs, in the folder of a plan; there is none between cases."""
_LEAST_ALLOWED_S = 90.0
_GRACE_S = 2.0
"""How long ranks may go on once one has failed, to tell of their own failures."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What the ranks of a job are told.

    Attributes:
        cases: by name, in order.
        results: the file of results, which rank 0 writes.
        work: folder of models and of what is told of failures; logs, one a rank, lie beside the results.
        deadline: seconds since 1970 after which no case is begun.
        seconds: that each case is expected to take; one is not begun where less is left.
        is_profiled: trace one more step of what is timed, on rank 0, beside the logs.
    """

    cases: tuple[str, ...]
    results: str
    work: str
    call: str
    deadline: float
    seconds: dict[str, float]
    is_tiny: bool = False
    is_profiled: bool = False


def run_job(plan: Plan, ranks: int, script: Path) -> None:
    """Run a plan's cases, in new jobs after failures, until all are done or time is up.

    Raises:
        SystemExit: a job failed outside of its cases.
    """
    results, left = Results(Path(plan.results)), list(plan.cases)
    while left and time.time() + plan.seconds[left[0]] < plan.deadline:
        failed = _run_once(replace(plan, cases=tuple(left)), ranks, script)
        if failed is None:
            return
        name, row = failed
        if not name:
            raise SystemExit(f"the job failed outside of its cases:\n{row}")
        results.put(name, row, plan.call)
        print(line_of(name, row), flush=True)
        left = left[left.index(name) + 1 :]


def _run_once(plan: Plan, ranks: int, script: Path) -> tuple[str, dict[str, Any]] | None:
    """Run a job.

    Returns:
        the case that it failed in, "" for none, and what is told of it; None if all went well or time was up.
    """
    folder, logs = Path(plan.work), Path(plan.results).parent / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    current = folder / CURRENT
    for file in (current, *folder.glob("failed-*.json")):
        file.unlink(missing_ok=True)
    plan_file = folder / "plan.json"
    write(plan_file, asdict(plan))
    processes = _start([sys.executable, str(script), "--worker", str(plan_file)], ranks, logs)
    try:
        reason = _watch(processes, plan, current)
    finally:
        _end(processes)
    failures = sorted((read(file) for file in folder.glob("failed-*.json")), key=lambda found: found["at"])
    if time.time() > plan.deadline or (reason is None and not failures):
        return None
    name = read(current)["case"] if current.exists() else ""
    if failures:
        first = failures[0]
        return name, {first["kind"]: first["text"], "rank": first["rank"], "failed_ranks": len(failures)}
    return name, {"error": reason, "log": (logs / "rank-0.log").read_text(encoding="utf-8")[-3000:]}


def _start(command: Sequence[str], ranks: int, logs: Path) -> list[subprocess.Popen[bytes]]:
    port, processes = free_port(), []
    for rank in range(ranks):
        environment = {
            "PYTORCH_ALLOC_CONF": "expandable_segments:True",  # as the command line sets it
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        with (logs / f"rank-{rank}.log").open("ab") as log:
            out = None if rank == 0 else log
            processes.append(subprocess.Popen(command, env=environment, stdout=out, stderr=log))
    return processes


def _watch(processes: Sequence[subprocess.Popen[bytes]], plan: Plan, current: Path) -> str | None:
    """Wait until all ranks have ended, or one has failed, or a case takes too long; returns why they must be ended."""
    while True:
        codes = [process.poll() for process in processes]
        if all(code == 0 for code in codes):
            return None
        bad = [(rank, code) for rank, code in enumerate(codes) if code]
        if bad:
            time.sleep(_GRACE_S)
            return f"rank {bad[0][0]} ended with exit code {bad[0][1]}"
        if time.time() > plan.deadline:
            return "the call's time was up"
        if (found := _running(current)) is not None:
            allowed = max(_LEAST_ALLOWED_S, 4 * plan.seconds[found["case"]])
            if time.time() - found["since"] > allowed:
                for process in processes:
                    with suppress(ProcessLookupError):
                        process.send_signal(signal.SIGUSR1)  # where each is, for the log
                time.sleep(1)
                return f"the case had not ended after {allowed:.0f} s"
        time.sleep(0.1)


def _running(current: Path) -> dict[str, Any] | None:
    """The case that runs now, and since when."""
    try:
        return read(current)
    except FileNotFoundError:
        return None


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.kill()
    for process in processes:
        process.wait()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def write(file: Path, found: dict[str, Any]) -> None:
    """Replace a file that another process may be reading."""
    part = file.with_suffix(".part")
    part.write_text(json.dumps(found), encoding="utf-8")
    part.replace(file)


def read(file: Path) -> dict[str, Any]:
    """A file of `write`."""
    return json.loads(file.read_text(encoding="utf-8"))
