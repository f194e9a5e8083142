"""Steps as CUDA graphs: one launch instead of one for each kernel, for which a small model waits more than it computes.

A step reads and writes the same memory each time and has the same shapes for as long as no row leaves and keys stay
below the next multiple of their bound, so it is recorded once for each pair of shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Step = Callable[[int, int], None]


class Graphs:
    """Stands in for a step: runs it, and from the second time with the same shapes on replays it.

    The first time is what warms up: kernels are loaded, and what is made once (caches, casts of weights) is made.
    """

    def __init__(self, step: Step) -> None:
        self._step = step
        self._seen: set[tuple[int, int]] = set()
        self._graphs: dict[tuple[int, int], Any] = {}
        self._pool: Any = None

    def __call__(self, num_rows: int, num_keys: int) -> None:
        """One step of the first rows over so many keys."""
        shapes = (num_rows, num_keys)
        if shapes not in self._seen:
            self._seen.add(shapes)
            self._step(num_rows, num_keys)
            return
        if shapes not in self._graphs:
            self._graphs[shapes] = self._record(num_rows, num_keys)
        self._graphs[shapes].replay()

    def _record(self, num_rows: int, num_keys: int) -> Any:
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        # other threads (those that watch collectives) may call CUDA while this one records
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self._step(num_rows, num_keys)
        return graph
