"""Work beside the training: one job at a time, whose failure is not lost."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Background:
    """Runs jobs in a thread, one after the other. An exit of the process waits for the last."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def start(self, job: Callable[[], None]) -> None:
        """Begin a job, once the one before is done; raises what that one raised."""
        self.wait()
        self._pending = self._executor.submit(job)

    def wait(self) -> None:
        """Until nothing is under way; raises what the job raised."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()
