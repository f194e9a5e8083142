"""Micro-batches replayed as CUDA graphs: forward pass, loss and backward pass with one launch.

A small step is some ten thousand kernels of a few microseconds, and a host that launches them one by one takes longer
than they do. So the first micro-batch of each shape is recorded, and later ones of its shape are copied to where the
first one lay. Shapes are rounded up, so that there are few: what fills a row up is one more document, which trains
nothing. All recordings share their memory, which is what the largest one needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fourfold.base.log import get_logger
from fourfold.dataset.batch import Batch
from fourfold.dataset.collate import CutPolicy, widen
from fourfold.parallel.terms import LossTerms, Term

log = get_logger(__name__)

MOST_TOKENS = 4096
"""Longer micro-batches keep a device busy by themselves."""
_STEPS = ((1280, 128), (4096, 256))
"""Up to so many positions, rows are a multiple of so many: an H100 takes as long for what lies between, or nearly."""
_PARTS_SCORED = (4, 2, 1)
"""What part of a row's positions is scored is told apart so: a finer cut saves less than its recordings take."""
_MOST_RECORDED = 48
_DOCUMENTS = 16
_LONGEST = (512, 1024)
"""Lengths of the longest document that are told apart, where a row is at least four times as long: PyTorch's attention
kernel starts a block for each 128 positions that any document might have, though most have not."""
_NOT_COMPILED = "fail_on_recompile"
"""The stance of torch.compile in which a function that would have to be compiled is an error, which names it."""

Work = Callable[[Batch, dict[str, Tensor]], LossTerms]
"""Forward pass, loss and backward pass of a micro-batch on the device, given the step's denominators as scalars; adds
to the gradients, and returns the detached sums. It must not wait for the device, nor read numbers that are not in the
batch's tensors."""


def rounded(batch: Batch) -> Batch:
    """A packed micro-batch on the host with `scored`, filled up so that few shapes are left.

    What differs from batch to batch and is no tensor is taken away, so that nobody can read it: a recording would go on
    with it, and what runs without one is the same work.
    """
    size = batch.input_ids.shape[1]
    step = next((step for limit, step in _STEPS if size <= limit), _STEPS[-1][1])
    width = -(-size // step) * step
    assert batch.scored is not None
    batch = widen(batch, width, CutPolicy(packed=True, max_tokens=width))
    assert batch.cu_seqlens is not None and batch.scored is not None
    most_scored = next(width // part for part in _PARTS_SCORED if len(batch.scored) <= width // part)
    return replace(
        batch,
        scored=_filled(batch.scored, most_scored, width - 1),  # nothing is predicted at the last position
        cu_seqlens=_filled(batch.cu_seqlens[1:], _DOCUMENTS, width, start=batch.cu_seqlens[:1]),
        longest=next((limit for limit in _LONGEST if batch.max_seqlen <= limit <= width // 4), width),
        lengths=(),
        samples=(),
        num_tokens=0,
        numbers={},
        extras={},
    )


def _filled(values: Tensor, multiple: int, value: int, start: Tensor | None = None) -> Tensor:
    missing = max(-(-len(values) // multiple), 1) * multiple - len(values)
    parts = [values, values.new_full((missing,), value)]
    return torch.cat(parts if start is None else [start, *parts])


@dataclass(slots=True)
class _Recording:
    """A recorded micro-batch: where its inputs lie, and what it leaves behind."""

    graph: torch.cuda.CUDAGraph
    batch: Batch
    denominators: dict[str, Tensor]
    found: LossTerms


class Graphs:
    """The recordings of a model's step.

    Args:
        parameters: what is trained; their gradients stay where they are from the first micro-batch on.
        work: see Work.
        compiled: whether it runs compiled functions.
        prepare: gives a micro-batch, on the host, in tensors what the model makes of its other numbers.
    """

    def __init__(
        self,
        device: torch.device,
        parameters: Sequence[nn.Parameter],
        work: Work,
        *,
        compiled: bool = False,
        prepare: Callable[[Batch], Batch] = lambda batch: batch,
    ) -> None:
        self._device, self._parameters, self._work, self._compiled = device, parameters, work, compiled
        self._prepare = prepare
        self._recordings: dict[tuple[int, ...], _Recording] = {}
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._is_warm = False
        self._put_off: set[tuple[int, ...]] = set()
        self._failure: str | None = None

    @property
    def are_recorded(self) -> bool:
        """Whether there are recordings, which add to the gradients where they lie."""
        return bool(self._recordings)

    def takes(self, batch: Batch) -> bool:
        """Whether a micro-batch on the host is to be replayed."""
        plain = batch.is_packed and batch.keys is None
        return self._failure is None and plain and batch.input_ids.shape[1] <= MOST_TOKENS

    def run(self, batch: Batch, denominators: dict[str, float]) -> LossTerms:
        """Add the gradient of one micro-batch, which is on the host, and return its sums.

        Args:
            denominators: of the step, by name; none of them 0.
        """
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        batch = rounded(self._prepare(batch.with_scored()))
        assert batch.scored is not None and batch.cu_seqlens is not None
        key = (batch.input_ids.shape[1], len(batch.scored), len(batch.cu_seqlens), batch.longest)
        recording = self._recordings.get(key)
        if not self._is_warm or (recording is None and len(self._recordings) == _MOST_RECORDED):
            return self._directly(batch, denominators)
        if recording is None:
            try:
                recording = self._recordings[key] = self._record(batch, denominators)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                if _NOT_COMPILED in str(error) and key not in self._put_off:
                    self._put_off.add(key)
                    return self._directly(batch, denominators)
                self._failure = str(error).strip().splitlines()[0]
                log.warning("The step is not recorded as a CUDA graph, and runs as it is (%s)", self._failure)
                torch.cuda.synchronize(self._device)
                return self._directly(batch, denominators)
        else:
            _copy(batch, denominators, recording)
        recording.graph.replay()
        return _copied(recording.found)

    def _directly(self, batch: Batch, denominators: dict[str, float]) -> LossTerms:
        """Without a recording, on the stream that records: libraries set themselves up for each stream."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            found = self._work(batch.to(self._device), self._scalars(denominators))
        current.wait_stream(self._stream)
        self._is_warm = True
        return found

    def _record(self, batch: Batch, denominators: dict[str, float]) -> _Recording:
        """Record a micro-batch without running it; its inputs are in place."""
        fixed, scalars = batch.to(self._device), self._scalars(denominators)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self._device)
        # a compiler tries its kernels out, which ends a recording
        stance = torch.compiler.set_stance(_NOT_COMPILED) if self._compiled else nullcontext()
        with stance, torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            found = self._work(fixed, scalars)
        return _Recording(graph, fixed, scalars, found)

    def _scalars(self, denominators: dict[str, float]) -> dict[str, Tensor]:
        return {name: torch.tensor(value, device=self._device) for name, value in denominators.items()}


def _copy(batch: Batch, denominators: dict[str, float], into: _Recording) -> None:
    """Put a micro-batch of the same shape where the recorded one lay."""
    for name in ("input_ids", "targets", "weights", "position_ids", "document_ids", "cu_seqlens", "scored"):
        getattr(into.batch, name).copy_(getattr(batch, name).pin_memory(), non_blocking=True)
    if batch.noise is not None:
        assert into.batch.noise is not None
        for own, other in zip(into.batch.noise, batch.noise, strict=True):
            own.copy_(other.pin_memory(), non_blocking=True)
    for name, value in denominators.items():
        into.denominators[name].fill_(value)


def _copied(found: LossTerms) -> LossTerms:
    """The sums of a replay, which the next one writes over."""

    def copies(terms: Mapping[str, Term]) -> dict[str, Term]:
        return {name: Term(term.total.clone(), term.denominator) for name, term in terms.items()}

    return LossTerms(copies(found.terms), copies(found.metrics))
