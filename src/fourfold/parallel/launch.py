"""Workers: one process a rank on this machine, watched until all have ended.

A worker that fails ends the others: the first error is shown once, with its rank, and nothing is left running.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

from fourfold.base.errors import FourfoldError
from fourfold.base.log import get_logger

log = get_logger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_GRACE_S = 5.0
_PASS_ON_S = 0.3
_PR_SET_PDEATHSIG = 1
"""Of Linux's prctl(2): the signal that a process gets when its parent ends."""
_ECHO_S = 0.5
"""After a failure, how long others are given to tell of theirs, which may be the cause."""


class WorkerError(FourfoldError):
    """A worker failed; the others were ended.

    Attributes:
        is_sudden: it was killed, or ended without a word.
    """

    def __init__(self, message: str, exit_code: int = 1, *, is_sudden: bool = False) -> None:
        self.exit_code, self.is_sudden = exit_code, is_sudden
        super().__init__(message)


@dataclass(frozen=True, slots=True)
class _Failure:
    """Why a worker ended.

    Attributes:
        at: when, in seconds of the system's monotonic clock, which all processes share.
        is_sudden: it could not say why.
    """

    rank: int
    message: str
    exit_code: int
    at: float = field(default_factory=time.monotonic)
    is_sudden: bool = False


def is_worker() -> bool:
    """Whether a launcher (torchrun, or this module) started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@dataclass(frozen=True, slots=True)
class Machines:
    """The processes of a job.

    Attributes:
        per_node: processes on each machine.
        num_nodes, node_rank: machines, and which of them this is.
        address, port: where rank 0 is met; port 0 takes a free one (on a single machine).
    """

    per_node: int = 1
    num_nodes: int = 1
    node_rank: int = 0
    address: str = "127.0.0.1"
    port: int = 0

    @property
    def world_size(self) -> int:
        """Processes of the whole job."""
        return self.per_node * self.num_nodes

    def environment(self, local_rank: int, port: int) -> dict[str, str]:
        """What PyTorch's rendezvous reads, for one process of this machine."""
        return {
            "RANK": str(self.node_rank * self.per_node + local_rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.per_node),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(port),
            # Threads do not survive a fork; the workers' data is tokenised already.
            "TOKENIZERS_PARALLELISM": "false",
        }


def launch(work: Callable[[], object], machines: Machines, *, fresh: bool) -> None:
    """Run `work` in this machine's processes of a job.

    Args:
        work: what each of them does; it must be picklable (a function of a module, with its arguments).
        fresh: start new interpreters instead of forking this one, which would keep what is imported. CUDA does not
            survive a fork of a process that has so much as asked for it, as libraries do when they are imported, nor
            does OpenMP once this process has computed with several threads.
    Raises:
        WorkerError: the first failure, with its rank.
    """
    readers: dict[int, Any] = {}
    processes: dict[int, BaseProcess] = {}
    early: list[int] = []  # signals that came before all were started
    started = threading.Event()

    def pass_on(number: int, frame: object) -> None:
        if not started.is_set():
            early.append(number)
        elif number == signal.SIGINT:
            _pass_on_later(processes, number)
        else:
            _signal_all(processes, number)

    previous = {number: signal.signal(number, pass_on) for number in _SIGNALS}
    try:
        _start(work, machines, "spawn" if fresh else "fork", processes, readers)
        started.set()
        for number in early:
            pass_on(number, None)
        failure = _watch(processes, readers)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        _end(processes)
    if failure is not None:
        raise WorkerError(failure.message, failure.exit_code, is_sudden=failure.is_sudden)


def _start(
    work: Callable[[], object],
    machines: Machines,
    method: str,
    processes: dict[int, BaseProcess],
    readers: dict[int, Any],
) -> None:
    """Start this machine's processes, and note each with what it tells of its end."""
    context: Any = multiprocessing.get_context(method)
    if method == "spawn":  # the first such process would start it, and let signals through again
        resource_tracker.ensure_running()
    port = machines.port or _free_port()
    for local_rank in range(machines.per_node):
        reader, writer = context.Pipe(duplex=False)
        environment = machines.environment(local_rank, port)
        arguments = (work, environment, writer, os.getpid())
        process = context.Process(target=_run, args=arguments, name=f"rank-{environment['RANK']}")
        with _signals_held():
            process.start()
        writer.close()
        readers[local_rank], processes[local_rank] = reader, process


@contextmanager
def _signals_held() -> Iterator[None]:
    """Within it signals wait, and for a process that is started in it until it takes them (`_run`).

    A forked interpreter forgets the signals that came before it ran for the first time. A spawned one takes them once
    its work is imported.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _pass_on_later(processes: dict[int, BaseProcess], number: int) -> None:
    """Send a signal to the workers, which from a terminal have it already: they take two in a second as one."""
    timer = threading.Timer(_PASS_ON_S, _signal_all, (processes, number))
    timer.daemon = True
    timer.start()


def _end_with(parent: int) -> None:
    """Have the system kill this process when the one that started it ends, however it does (Linux alone)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it has ended by now
            os._exit(1)


def _run(work: Callable[[], object], environment: dict[str, str], writer: Any, parent: int) -> None:
    _end_with(parent)
    os.environ.update(environment)
    rank = int(environment["RANK"])
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = 0
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        work()
    except FourfoldError as error:
        code = error.exit_code
        writer.send(_Failure(rank, str(error), code))
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        code = 130
        writer.send(_Failure(rank, "Interrupted.", code))
    except BaseException:
        code = 1
        writer.send(_Failure(rank, f"[rank {rank}] {traceback.format_exc()}", code))
    # Threads of a broken collective would keep the interpreter from ending.
    os._exit(code)


def _watch(processes: dict[int, BaseProcess], readers: dict[int, Any]) -> _Failure | None:
    """Wait for all to end well, or for the first that does not."""
    running = dict(processes)
    while running:
        wait([process.sentinel for process in running.values()])
        for rank, process in list(running.items()):
            if process.is_alive():
                continue
            process.join()
            del running[rank]
            if process.exitcode:
                return _first_failure({rank: process, **running}, readers)
    return None


def _first_failure(processes: dict[int, BaseProcess], readers: dict[int, Any]) -> _Failure:
    """The one that came first: a rank that dies takes along those that wait for it, with errors of their own."""
    deadline = time.monotonic() + _ECHO_S
    while time.monotonic() < deadline and any(process.is_alive() for process in processes.values()):
        wait([process.sentinel for process in processes.values() if process.is_alive()], _ECHO_S / 10)
    failed = {rank: process.exitcode for rank, process in processes.items() if process.exitcode}
    return min((_failure_of(rank, code, readers[rank]) for rank, code in failed.items()), key=lambda found: found.at)


def _failure_of(rank: int, code: int, reader: Any) -> _Failure:
    with suppress(EOFError):
        if reader.poll():
            found = reader.recv()
            assert isinstance(found, _Failure)
            return found
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    hint = " (often the system, out of memory)" if code == -signal.SIGKILL else ""
    # It could not say when; whatever else was told came of it.
    return _Failure(rank, f"The worker of rank {rank} {how}{hint}; the others were ended.", 1, 0.0, is_sudden=True)


def _signal_all(processes: dict[int, BaseProcess], number: int) -> None:
    for process in processes.values():
        if process.is_alive() and process.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(process.pid, number)


def _end(processes: dict[int, BaseProcess]) -> None:
    """End what still runs: politely, then for good."""
    _signal_all(processes, signal.SIGTERM)
    for process in processes.values():
        process.join(_GRACE_S)
    _signal_all(processes, signal.SIGKILL)
    for process in processes.values():
        process.join()
