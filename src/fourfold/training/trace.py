"""What a step keeps in memory, tensor by tensor: the peak that an allocator would see, without one.

A `MemoryTrace` sees every operator that runs within it, so it works on real tensors and on fake ones, which have
shapes and no numbers. It counts storages, once however many tensors share one, and rounds as CUDA's allocator does.
What an operator takes for itself and gives back before it ends is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from fourfold.parallel.sharded import local

_ROUNDING = 512
"""Bytes that CUDA's caching allocator rounds every request up to."""


@dataclass
class Peak:
    """The most that was held at one time.

    Attributes:
        total: bytes.
        phase: name of the phase in which it was reached.
        by_phase: of these bytes, those of tensors that were made in each phase.
    """

    total: int = 0
    phase: str = ""
    by_phase: dict[str, int] = field(default_factory=dict)


class MemoryTrace(TorchDispatchMode):
    """Follows the storages of every tensor that is made within it, and those it is told of (`hold`).

    Attributes:
        peak: the largest total since the last `begin`.
        peaks: the largest total within each phase.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = Peak()
        self.peaks: dict[str, int] = {}
        self._phase = "before"
        self._held: dict[int, tuple[int, str, weakref.ref[Any]]] = {}
        self._by_phase: dict[str, int] = {}
        self._total = 0

    @property
    def total(self) -> int:
        """Bytes that are held now."""
        return self._total

    def held(self, phase: str) -> int:
        """Bytes held now by tensors that were made in a phase."""
        return self._by_phase.get(phase, 0)

    def begin(self) -> None:
        """Forget the peaks so far."""
        self.peak = Peak(self._total, self._phase, dict(self._by_phase))
        self.peaks = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Within it, tensors that are made belong to `name`."""
        before, self._phase = self._phase, name
        self._note()
        try:
            yield
        finally:
            self._phase = before

    def hold(self, tensors: Iterable[Tensor], phase: str) -> None:
        """Count tensors that were made before, or count them under another phase."""
        for tensor in tensors:
            self._track(local(tensor), phase)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and count what it gives."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its operators on local parts come by again
        found = func(*args, **kwargs or {})
        for value in tree_iter(found):
            if isinstance(value, Tensor):
                self._track(value, None)
        return found

    def __enter__(self) -> MemoryTrace:
        """Also see storages that change their size in place, as FSDP's gathered weights do."""
        resize = torch.UntypedStorage.resize_

        def resize_and_count(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            found = resize(storage, size)
            self._resized(storage)
            return found

        self._patch = mock.patch.object(torch.UntypedStorage, "resize_", resize_and_count)
        self._patch.start()
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        """Stop looking."""
        super().__exit__(*exc)
        self._patch.stop()

    def _track(self, tensor: Tensor, phase: str | None) -> None:
        """Count a tensor's storage, under the phase given or, if it is new, the present one."""
        if tensor.is_meta and not _is_fake(tensor):
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._held.get(key)
        if known is not None:
            if phase is not None and known[1] != phase:
                self._move(known[0], known[1], phase)
                self._held[key] = (known[0], phase, known[2])
            return
        phase = phase or self._phase
        self._held[key] = (0, phase, weakref.ref(storage, lambda _: self._forget(key)))
        self._set(key, storage.nbytes())

    def _resized(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._held:
            self._set(storage._cdata, storage.nbytes())

    def _set(self, key: int, num_bytes: int) -> None:
        before, phase, reference = self._held[key]
        size = -(-num_bytes // _ROUNDING) * _ROUNDING
        self._held[key] = (size, phase, reference)
        self._by_phase[phase] = self._by_phase.get(phase, 0) + size - before
        self._total += size - before
        self._note()

    def _move(self, size: int, before: str, after: str) -> None:
        self._by_phase[before] -= size
        self._by_phase[after] = self._by_phase.get(after, 0) + size

    def _forget(self, key: int) -> None:
        size, phase, _ = self._held.pop(key)
        self._by_phase[phase] -= size
        self._total -= size

    def _note(self) -> None:
        if self._total > self.peaks.get(self._phase, -1):
            self.peaks[self._phase] = self._total
        if self._total > self.peak.total:
            self.peak = Peak(self._total, self._phase, {name: size for name, size in self._by_phase.items() if size})


def _is_fake(tensor: Tensor) -> bool:
    return hasattr(tensor, "fake_mode")
