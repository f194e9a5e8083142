"""Workers: one process a rank on this machine, started after the heavy imports, watched until all have ended.

A worker that fails ends the others: the first error is shown once, with its rank, and nothing is left running.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from fourfold.base.errors import FourfoldError
from fourfold.base.log import get_logger

log = get_logger(__name__)

_GRACE_S = 5.0


class WorkerError(FourfoldError):
    """A worker failed; the others were ended."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        self.exit_code = exit_code
        super().__init__(message)


@dataclass(frozen=True, slots=True)
class _Failure:
    rank: int
    message: str
    exit_code: int


def is_worker() -> bool:
    """Whether a launcher (torchrun, or this module) started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch(work: Callable[[], None], num_workers: int) -> None:
    """Run `work` in `num_workers` forked processes that form one job.

    Forking keeps what is imported and loaded; it must happen before the first use of a GPU.

    Raises:
        WorkerError: the first failure, with its rank.
    """
    context = multiprocessing.get_context("fork")
    port = _free_port()
    readers: dict[int, Connection] = {}
    processes: dict[int, BaseProcess] = {}
    for rank in range(num_workers):
        reader, writer = context.Pipe(duplex=False)
        environment = _environment(rank, num_workers, port)
        process = context.Process(target=_run, args=(work, environment, writer), name=f"rank-{rank}")
        process.start()
        writer.close()
        readers[rank], processes[rank] = reader, process
    previous = signal.signal(signal.SIGTERM, lambda number, frame: _signal_all(processes, signal.SIGTERM))
    interrupts = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to the workers as well
    try:
        failure = _watch(processes, readers)
    finally:
        signal.signal(signal.SIGTERM, previous)
        signal.signal(signal.SIGINT, interrupts)
        _end(processes)
    if failure is not None:
        raise WorkerError(failure.message, failure.exit_code)


def _environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _run(work: Callable[[], None], environment: dict[str, str], writer: Connection) -> None:
    os.environ.update(environment)
    rank = int(environment["RANK"])
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = 0
    try:
        work()
    except FourfoldError as error:
        code = error.exit_code
        writer.send(_Failure(rank, str(error), code))
    except KeyboardInterrupt:
        code = 130
        writer.send(_Failure(rank, "Interrupted.", code))
    except BaseException:
        code = 1
        writer.send(_Failure(rank, f"[rank {rank}] {traceback.format_exc()}", code))
    # Threads of a broken collective would keep the interpreter from ending.
    os._exit(code)


def _watch(processes: dict[int, BaseProcess], readers: dict[int, Connection]) -> _Failure | None:
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
                return _failure_of(rank, process.exitcode, readers[rank])
    return None


def _failure_of(rank: int, code: int, reader: Connection) -> _Failure:
    with suppress(EOFError):
        if reader.poll():
            found = reader.recv()
            assert isinstance(found, _Failure)
            return found
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    hint = " (often the system, out of memory)" if code == -signal.SIGKILL else ""
    return _Failure(rank, f"The worker of rank {rank} {how}{hint}; the others were ended.", 1)


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
