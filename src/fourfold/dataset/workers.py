"""Running the chunks of a data set: in this process, or in a bounded pool of others.

The pool consists of fresh interpreters, not forks: a fork of a process with threads (torch, tokenizers) may hang, and
`multiprocessing`'s other ways import the user's main script again. While they start, which takes a second or more, the
parent tokenises, so that a small data set need not wait for them. A worker that dies, for example for want of memory,
is noticed at once; the parent takes all of them with it when it leaves.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait

from fourfold.base.errors import DataError
from fourfold.base.log import get_logger
from fourfold.dataset.raw import RawRows
from fourfold.dataset.tokenise import ChunkResult, ChunkTokeniser

log = get_logger(__name__)

MOST_WORKERS = 16
ROWS_PER_WORKER = 10_000
"""Rows that are worth the start of a process, which takes some seconds."""

_QUEUED = 2
"""Chunks that a worker has before it, so that it need not wait for the next."""
_AHEAD = 4
"""Chunks per worker that may be finished before their turn; bounds memory when one is slow."""

_Span = tuple[int, int]


def num_workers(num_rows: int, requested: int | None) -> int:
    """How many processes are worth starting: at most as many as asked for, and as there are cores.

    Args:
        requested: `preprocessing_num_workers`; None for up to MOST_WORKERS.
    """
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    number = max(1, min(requested or MOST_WORKERS, cores, num_rows // ROWS_PER_WORKER))
    if requested is not None and number < requested:
        log.info(
            "preprocessing_num_workers: %d of %d processes are used; there are %d cores, and a process is worth its "
            "start from %d rows on.",
            number,
            requested,
            cores,
            ROWS_PER_WORKER,
        )
    return number


def run_chunks(mix: RawRows, tokeniser: ChunkTokeniser, *, chunk_rows: int, workers: int) -> Iterator[ChunkResult]:
    """The results of all chunks, in order.

    Args:
        chunk_rows: rows of a chunk.
        workers: processes; 1 for this one alone.
    Raises:
        DataError: a row is bad, or a worker died.
    """
    spans = [(start, min(start + chunk_rows, len(mix))) for start in range(0, len(mix), chunk_rows)]
    if workers == 1:
        for start, stop in spans:
            yield tokeniser.run(mix.read(start, stop))
        return
    pool = _Pool(mix, tokeniser, min(workers, len(spans)))
    try:
        yield from pool.run(spans)
    finally:
        pool.stop()


@dataclass(slots=True)
class _Worker:
    """A process.

    Attributes:
        connection: to it.
        started: whether it has said that it is ready.
        waiting: the numbers of the chunks that it has before it.
    """

    process: subprocess.Popen[bytes]
    connection: Connection
    started: bool = False
    waiting: deque[int] = field(default_factory=deque)

    @classmethod
    def start(cls) -> _Worker:
        ours, theirs = socket.socketpair()
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1",
        }
        handle = theirs.fileno()
        command = [sys.executable, "-m", "fourfold.dataset.worker", str(handle)]
        process = subprocess.Popen(command, pass_fds=(handle,), env=environment, stdin=subprocess.DEVNULL)
        theirs.close()
        return cls(process, Connection(ours.detach()))

    def death(self) -> DataError:
        code = self.process.wait()
        cause = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
        hint = " Most often memory ran out: lower preprocessing_num_workers." if code == -9 else ""
        return DataError(f"preprocessing_num_workers: a process that tokenised {cause}.{hint}")


class _Pool:
    def __init__(self, mix: RawRows, tokeniser: ChunkTokeniser, size: int) -> None:
        self._mix, self._tokeniser = mix, tokeniser
        self._workers = [_Worker.start() for _ in range(size)]

    def run(self, spans: Sequence[_Span]) -> Iterator[ChunkResult]:
        for worker in self._workers:
            self._send(worker, (self._mix, self._tokeniser))
        finished: dict[int, ChunkResult] = {}
        upcoming, given = 0, 0
        while upcoming < len(spans):
            limit = min(len(spans), upcoming + _AHEAD * len(self._workers))
            given = self._give(spans, given, limit)
            starting = not all(worker.started for worker in self._workers)
            for worker in self._ready(wait_for_one=not (starting and given < limit)):
                result = self._receive(worker)
                if result is None:
                    worker.started = True
                else:
                    finished[worker.waiting.popleft()] = result
            if starting and given < limit:
                finished[given] = self._tokeniser.run(self._mix.read(*spans[given]))
                given += 1
            while upcoming in finished:
                yield finished.pop(upcoming)
                upcoming += 1

    def _give(self, spans: Sequence[_Span], given: int, limit: int) -> int:
        """Hand out chunks, one to each worker in turn, while there is room; returns how many are given in all."""
        for depth in range(_QUEUED):
            for worker in self._workers:
                if worker.started and len(worker.waiting) == depth and given < limit:
                    self._send(worker, spans[given])
                    worker.waiting.append(given)
                    given += 1
        return given

    def _ready(self, *, wait_for_one: bool) -> list[_Worker]:
        """The workers that have something to say."""
        busy = {worker.connection: worker for worker in self._workers if worker.waiting or not worker.started}
        told = wait(list(busy), None if wait_for_one else 0)
        return [busy[connection] for connection in told if isinstance(connection, Connection)]

    @staticmethod
    def _send(worker: _Worker, message: object) -> None:
        try:
            worker.connection.send(message)
        except (BrokenPipeError, ConnectionResetError):
            raise worker.death() from None

    @staticmethod
    def _receive(worker: _Worker) -> ChunkResult | None:
        """A result; None if the worker says that it is ready for the first chunk."""
        try:
            result = worker.connection.recv()
        except (EOFError, ConnectionResetError):
            raise worker.death() from None
        if isinstance(result, BaseException):
            raise result
        return result

    def stop(self) -> None:
        for worker in self._workers:
            worker.connection.close()
            worker.process.terminate()
        for worker in self._workers:
            worker.process.wait()
