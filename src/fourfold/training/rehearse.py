"""One rank of a planned job, run on one device or none: what it holds, and what its step takes.

The other ranks are imagined: a process group of torch's kind `fake`, whose collectives return at once and move
nothing. So losses mean nothing, while shapes, memory and the work of this rank are those of the real job.

With `fake` tensors there is no device either: tensors have shapes and no numbers, and memory is what `trace.py` counts.
Branches that the engine takes on GPUs only are taken then, too, so that what is traced is what a GPU would do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from fourfold.base import registry
from fourfold.base.log import get_logger
from fourfold.config.schema import Run
from fourfold.config.second import teacher_run
from fourfold.dataset.batch import Example, Sample
from fourfold.dataset.collate import CutPolicy, cut, filler
from fourfold.losses.token import TokenLoss
from fourfold.models.blank import blank_model
from fourfold.models.groups import parameter_groups
from fourfold.models.unwrap import base_model
from fourfold.objectives.interface import Objective
from fourfold.parallel import context, loss
from fourfold.parallel.dispatch import Dispatch, Sizes
from fourfold.parallel.gradients import NoSync
from fourfold.parallel.mesh import build_mesh, single
from fourfold.parallel.recompute import Recompute
from fourfold.parallel.reduce import Reducer
from fourfold.parallel.sharded import local
from fourfold.planning.job import CHUNK_TOKENS
from fourfold.planning.layout import Layout
from fourfold.planning.wishes import Wishes
from fourfold.training.build import Built, build
from fourfold.training.clipping import clip_for
from fourfold.training.frozen import split_frozen
from fourfold.training.precision import resolve
from fourfold.training.teacher import LoadedTeacher
from fourfold.training.trace import MemoryTrace, Peak

log = get_logger(__name__)

_AS_THEY_ARE = ("pt", "sft", "kd", "rm")
"""Stages that run as they are; what others train on is made of real answers. Their training pass is that of sft."""
_Made = TypeVar("_Made")
_OBJECTIVES, _OPTIMIZERS = "fourfold.objectives", "fourfold.training.optimizers"


@dataclass(frozen=True, slots=True)
class Workload:
    """What a rank computes in a step.

    Attributes:
        sequences: lengths of the sequences of one micro-batch.
        micro_batches: of a step; a pipeline runs at least as many as its schedule needs.
        trained: share of the tokens that are trained on.
        expert_load: with expert parallelism, tokens that reach this rank's experts over those of an even spread.
    """

    sequences: tuple[int, ...]
    micro_batches: int = 1
    trained: float = 1.0
    expert_load: float = 1.0


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What a rank was found to take.

    Attributes:
        parameters, gradients, optimizer: bytes that it holds between steps, gradients whole.
        peak: the most that it held in a step after the first.
        reserved: bytes that the allocator had reserved by then; None without a device.
        step_s: median seconds of a step; None without a device.
        tokens: of a step on this rank.
    """

    parameters: int
    gradients: int
    optimizer: int
    peak: Peak
    reserved: int | None
    step_s: float | None
    tokens: int


def left_out(run: Run) -> Iterator[str]:
    """What of a run its rehearsal does otherwise, a sentence each."""
    stage = run.training.stage
    if stage not in _AS_THEY_ARE:
        yield f"Of stage {stage} the training pass is rehearsed, as sft: no answers are made and no reference is asked."
    if Wishes.of(run).compiles:
        yield "Layers are rehearsed as they are; where the run compiles them, `fourfold plan` may name another layout."
    if run.model.quantization_bit == 8:
        yield "Weights of 8 bits are rehearsed as 4."
    if run.parallel.offload != "none":
        yield f"parallel.offload: {run.parallel.offload} is not rehearsed: all stays on the device."


def rehearse(
    run: Run,
    layout: Layout,
    workload: Workload,
    *,
    rank: int = 0,
    recompute: Recompute = "none",
    device: torch.device | None = None,
    steps: int = 2,
    unpacked: bool = False,
    spared: int = 0,
    joins_gradients: bool = False,
) -> Rehearsal:
    """Run one rank of a job; collectives do nothing.

    Args:
        rank: of the job.
        device: None for fake tensors.
        steps: at least 2: the first one also makes the optimizer's state.
        unpacked: 4-bit weights are unpacked once and kept.
        spared: layers of which nothing is computed again.
        joins_gradients: FSDP's shards of gradients lie where the rest does, as `planning.estimate.Memory` says.
    """

    def prepare(built: Built) -> None:
        if unpacked:
            built.keep_unpacked(run)
        built.recompute(recompute, spared)
        if joins_gradients and device is not None:
            built.join_gradients()

    with ExitStack() as stack:
        if layout.world_size > 1:
            stack.enter_context(_imagined_ranks(rank, layout.world_size))
            stack.enter_context(_chosen_experts(workload.expert_load))
        micro_batches = _micro_batches(workload, run.training.stage)  # real numbers, also for fake tensors
        if device is None:
            stack.enter_context(_gpu_branches())
            stack.enter_context(_real_meshes())
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            stack.enter_context(_Assumptions())
            trace = stack.enter_context(MemoryTrace())
            return _steps(run, layout, micro_batches, prepare, torch.device("cpu"), trace, steps)
        return _steps(run, layout, micro_batches, prepare, device, None, steps)


def _steps(
    run: Run,
    layout: Layout,
    micro_batches: Sequence[Sequence[Sample]],
    prepare: Callable[[Built], None],
    device: torch.device,
    trace: MemoryTrace | None,
    steps: int,
) -> Rehearsal:
    built = _build(run, layout, device, fake=trace is not None)
    prepare(built)
    built.module.train()
    parameters = [p for p in built.module.parameters() if p.requires_grad]
    groups = parameter_groups(built.module, run.training, run.tuning)
    optimizer = registry.load(_OPTIMIZERS, run.training.optim, key="optim").build(groups, built.module, run)
    if trace is not None and isinstance(optimizer, torch.optim.AdamW):
        for group in optimizer.param_groups:  # as on a GPU
            group |= {"fused": True, "foreach": False}
    stage = run.training.stage if run.training.stage in _AS_THEY_ARE else "sft"
    objective: Objective = registry.load(_OBJECTIVES, stage, key="stage").build(run)
    longest = max(sum(map(len, samples)) for samples in micro_batches)
    policy = CutPolicy(packed=built.model.packed, max_tokens=longest, multiple=built.multiple)
    step = built.step(objective, partial(_for_real, partial(filler, policy)))
    step = replace(step, teacher=_teacher(run, layout, built, device, fake=trace is not None))
    batches = [batch for samples in micro_batches for batch in _for_real(partial(cut, samples, policy))]
    gradients = 0
    clock = _Clock(device, trace)
    for number in range(max(steps, 2)):
        if number == 1:
            clock.begin()
        optimizer.zero_grad(set_to_none=True)
        with clock.phase("forward and backward"):
            step.forward_backward(batches)
        gradients = sum(local(p.grad).nbytes for p in parameters if p.grad is not None)
        with clock.phase("optimizer"):
            clip_for(optimizer, parameters, run.training.max_grad_norm, built.split.gradient_norm)
            optimizer.step()
        clock.step_ended()
    state = [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)]
    return Rehearsal(
        parameters=sum(local(p).nbytes for p in built.module.parameters()),
        gradients=gradients,
        optimizer=sum(local(value).nbytes for value in state),
        peak=clock.peak(),
        reserved=clock.reserved(),
        step_s=clock.median(),
        tokens=sum(batch.num_tokens for batch in batches),
    )


def _build(run: Run, layout: Layout, device: torch.device, *, fake: bool) -> Built:
    with _disable_current_modes():  # a mesh is made of numbers
        mesh = build_mesh(layout, device) if layout.world_size > 1 else single(device)
    precision = resolve(run)
    module, fill = blank_model(run, precision.load, precision.master, device, on_meta=layout.splits_model and not fake)
    return _without_partners(build(run, precision, mesh, module, fill), layout)


def _teacher(run: Run, layout: Layout, student: Built, device: torch.device, *, fake: bool) -> LoadedTeacher | None:
    """The second model of a run that has one."""
    teacher = teacher_run(run)
    if teacher is None:
        return None
    dtype, on_meta = resolve(run).compute, layout.splits_model and not fake
    module, fill = blank_model(teacher, dtype, None, device, on_meta=on_meta, trainable=False)
    built = split_frozen(teacher, student.mesh, module, fill, beside=student)
    step = _without_partners(built, layout).step(TokenLoss(), partial(filler, CutPolicy(built.model.packed, 1)))
    return LoadedTeacher(step)


def _without_partners(built: Built, layout: Layout) -> Built:
    """A model whose other ranks are imagined."""
    # What other ranks counted or found is not there to be asked for.
    split = replace(built.split, reducer=Reducer())
    if layout.shards * layout.pp == 1:
        # DDP's reducer needs partners and numbers. Its buckets are the gradients themselves, in views.
        split = replace(split, runner=base_model(built.module), sync=NoSync())
        built.model.take(split)
    return replace(built, split=split)


def _micro_batches(workload: Workload, stage: str) -> list[list[Sample]]:
    """Made-up samples: every micro-batch the same lengths. Of stage rm two answers share a length."""
    batches = []
    for number in range(workload.micro_batches):
        samples = []
        for length in workload.sequences:
            ids = [3 + i % 500 for i in range(length)]
            skipped, half = round(length * (1 - workload.trained)), length // 2
            sequences = {"": Example(ids, [-100] * skipped + ids[skipped:])}
            if stage == "rm":
                chosen, rejected = ids[half:], ids[:half]
                sequences = {"chosen": Example(chosen, chosen), "rejected": Example(rejected, rejected)}
            samples.append(Sample(sequences, number))
        batches.append(samples)
    return batches


def _for_real(make: Callable[[], _Made]) -> _Made:
    """Micro-batches are made of numbers, which fake tensors do not have."""
    with _disable_current_modes():
        return make()


@contextmanager
def _imagined_ranks(rank: int, world_size: int) -> Iterator[None]:
    """A process group of which only this rank exists."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        with _told_shapes():
            yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _told_shapes() -> Iterator[None]:
    """Stages of a pipeline take the shapes that they were told, without asking their neighbours (torch >= 2.13)."""
    with ExitStack() as stack:
        for name in ("_warmup_forward_vote", "_warmup_backward_result"):
            if hasattr(PipelineStage, name):
                stack.enter_context(mock.patch.object(PipelineStage, name, lambda *_, **__: torch.ones(1)))
        yield


@contextmanager
def _gpu_branches() -> Iterator[None]:
    """Take the branches that the engine takes on GPUs, though there is none."""
    with (
        _packed_weights_stay_fake(),
        mock.patch.object(context, "has_varlen", lambda device: True),
        mock.patch.object(loss, "_CPU_CHUNK_TOKENS", CHUNK_TOKENS),
    ):
        yield


@contextmanager
def _real_meshes() -> Iterator[None]:
    """Parts of meshes are made of numbers, too; and what DTensor tries out at full size is nobody's memory."""

    def outside(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with _disable_current_modes():
                return method(*args, **kwargs)

        return call

    methods = [
        (DeviceMesh, "__init__"),
        (DeviceMesh, "_flatten"),
        (ShardingPropagator, "_propagate_tensor_meta_non_cached"),
    ]
    with ExitStack() as stack:
        for owner, name in methods:
            stack.enter_context(mock.patch.object(owner, name, outside(getattr(owner, name))))
        yield


@contextmanager
def _packed_weights_stay_fake() -> Iterator[None]:
    """bitsandbytes makes gathered weights parameters of its own kind, which fake tensors cannot be."""
    try:
        from bitsandbytes.nn import modules
    except ImportError:
        yield
        return

    def give_scales(layer: Any) -> None:
        layer.weight.quant_state = layer.quant_state

    with mock.patch.object(modules, "fix_4bit_weight_quant_state_from_module", give_scales):
        yield


@contextmanager
def _chosen_experts(load: float) -> Iterator[None]:
    """Experts of all ranks are chosen alike often, and those of this rank `load` times so: nobody is there to ask."""

    def ask(self: Dispatch, sent: Tensor, choices: int) -> tuple[Tensor, Callable[[], Sizes]]:
        ranks, here = dist.get_world_size(self._group), self._count
        even = [(rank + 1) * choices // ranks - rank * choices // ranks for rank in range(ranks)]
        come = [round(load * size) for size in even]
        arrived = [[(e + 1) * size // here - e * size // here for e in range(here)] for size in come]
        return torch.tensor(arrived, dtype=torch.int32, device=sent.device), lambda: (even, come)

    with mock.patch.object(Dispatch, "_ask", ask):
        yield


class _Assumptions(TorchDispatchMode):
    """Answers what depends on numbers, which fake tensors do not have: every position counts, every number is 1."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, or make its answer up."""
        if func not in _ASKING:
            return func(*args, **kwargs or {})
        if not isinstance(args[0], FakeTensor):
            with _disable_current_modes():  # it has numbers
                return func(*args, **kwargs or {})
        if func is torch.ops.aten.allclose.default or func is torch.ops.aten.equal.default:
            return True
        if func is torch.ops.aten.nonzero.default:
            return args[0].new_empty((args[0].numel(), args[0].ndim), dtype=torch.int64)
        return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1


_ASKING = frozenset(
    getattr(torch.ops.aten, name).default for name in ("allclose", "equal", "nonzero", "_local_scalar_dense")
)
"""Operators whose answer depends on numbers."""


class _Clock:
    """Peaks and times of the steps after the first, from the device or from a trace."""

    def __init__(self, device: torch.device, trace: MemoryTrace | None) -> None:
        self._device, self._trace = device, trace
        self._times: list[float] = []
        self._phase_peaks: dict[str, int] = {}
        self._last = 0.0

    def begin(self) -> None:
        self._times.clear()
        self._phase_peaks.clear()
        if self._trace is not None:
            self._trace.begin()
        elif self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self._last = self._now()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if self._trace is not None:
            with self._trace.phase(name):
                yield
            return
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        yield
        if self._device.type == "cuda":
            self._phase_peaks[name] = max(self._phase_peaks.get(name, 0), torch.cuda.max_memory_allocated())

    def step_ended(self) -> None:
        now = self._now()
        self._times.append(now - self._last)
        self._last = now

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def peak(self) -> Peak:
        if self._trace is not None:
            return self._trace.peak
        phase = max(self._phase_peaks, key=lambda name: self._phase_peaks[name], default="")
        return Peak(self._phase_peaks.get(phase, 0), phase)

    def reserved(self) -> int | None:
        return torch.cuda.max_memory_reserved() if self._device.type == "cuda" else None

    def median(self) -> float | None:
        return None if self._trace is not None else sorted(self._times)[len(self._times) // 2]
