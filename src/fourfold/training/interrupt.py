"""Ctrl-C and SIGTERM end a run at the next step, saved; a second one, a second later or more, ends it at once."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from fourfold.base.log import get_logger

log = get_logger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_ONCE_S = 1.0
"""A signal that comes so soon after the first is the same, from the terminal and from the process that started this."""


class StopRequest:
    """Context in which the signals that end a run only set `signal_number`."""

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._received_at = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        # Handlers can only be set in the main thread; elsewhere (a notebook's worker) the default stays.
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is not None:
            if time.monotonic() - self._received_at < _ONCE_S:
                return
            raise KeyboardInterrupt
        self.signal_number, self._received_at = number, time.monotonic()
        name = signal.Signals(number).name
        log.warning("%s received: saving after this step, then leaving. Once more to leave at once.", name)
