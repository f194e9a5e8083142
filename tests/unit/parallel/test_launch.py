"""Workers end with the process that started them, however that ends, and get its signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

_PROGRAM = """
import os, signal, sys, time
from pathlib import Path
from fourfold.base.errors import RunInterruptedError
from fourfold.parallel.launch import Machines, WorkerError, launch
from fourfold.training.interrupt import StopRequest

def work():
    rank = os.environ["RANK"]
    with StopRequest() as stop:
        Path(sys.argv[1], rank).write_text(str(os.getpid()))
        for _ in range(600):
            time.sleep(0.05)
            if stop.signal_number:
                raise RunInterruptedError(f"saved by {rank}", stop.signal_number)

if __name__ == "__main__":
    try:
        launch(work, Machines(per_node=2), fresh=False)
    except WorkerError as error:
        print(error, flush=True)
        sys.exit(error.exit_code)
"""


@pytest.fixture
def started(tmp_path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, str(tmp_path)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while len(pids(tmp_path)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    return process


def pids(folder: Path) -> list[int]:
    return [int(text) for name in ("0", "1") if (folder / name).exists() and (text := (folder / name).read_text())]


def is_running(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a process that its parent has ended")
def test_workers_when_their_parent_is_killed_end_with_it(started: subprocess.Popen[str], tmp_path: Path) -> None:
    workers = pids(tmp_path)
    assert len(workers) == 2
    started.kill()
    started.communicate()
    deadline = time.monotonic() + 10
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, workers))


@pytest.mark.parametrize("whole_group", [False, True], ids=["the parent alone", "as a terminal does"])
def test_workers_when_interrupted_save_and_leave(
    whole_group: bool, started: subprocess.Popen[str], tmp_path: Path
) -> None:
    assert len(pids(tmp_path)) == 2
    if whole_group:
        os.killpg(started.pid, signal.SIGINT)
    else:
        started.send_signal(signal.SIGINT)
    out, _ = started.communicate(timeout=30)
    assert "saved by" in out
    assert started.returncode == 128 + signal.SIGINT


_HASTE = """
import multiprocessing.process
if sys.platform == "linux":  # a worker then runs for the first time when this process has nothing to do
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
start = multiprocessing.process.BaseProcess.start

def start_and_be_interrupted(process):
    start(process)
    if process.name == "rank-0":
        os.kill(os.getpid(), int(sys.argv[2]))

multiprocessing.process.BaseProcess.start = start_and_be_interrupted
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_workers_when_interrupted_while_they_are_started_leave(number: signal.Signals, tmp_path: Path) -> None:
    program = _PROGRAM.replace("if __name__", _HASTE + "\nif __name__")
    found = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), str(int(number))],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        start_new_session=True,
    )
    assert "KeyboardInterrupt" not in found.stderr
    assert found.returncode in (1, 128 + number)  # a worker may not have come to listen by then
    deadline = time.monotonic() + 10
    while any(map(is_running, pids(tmp_path))) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, pids(tmp_path)))
