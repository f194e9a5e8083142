"""Pipeline parallelism: the micro-batches of a step run through the stages by PyTorch's schedules.

Between stages travel hidden states forward and their gradients back, micro-batch by micro-batch; nothing else does.
Positions, document boundaries and targets do not: every rank of a pipeline has the step's micro-batches and looks them
up by number.

Shapes are told to the stages (PyTorch's static mode), so that no micro-batch is run for the sake of its shapes. They
hold for one shape of micro-batch; stages are made anew when it changes, which costs no communication to speak of.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)

from fourfold.parallel.lanes import Lanes, Way, open_lanes
from fourfold.parallel.mesh import Mesh
from fourfold.parallel.sharded import local
from fourfold.parallel.stages import Part, StageCut
from fourfold.planning.stages import rank_of_stage, round_microbatches

_SINGLE = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
_DOUBLE = {"interleaved_1f1b": ScheduleInterleaved1F1B, "zbv": ScheduleZBVZeroBubble}

Wire = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of a tensor that goes from stage to stage, for one micro-batch."""


class StageForward(Protocol):
    """Runs one stage on one micro-batch."""

    def __call__(self, part: Part, number: int, received: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What the stage before sent (nothing for the first) -> what goes to the next; the last stage's loss alone."""
        ...


class StepSync(Protocol):
    """Exchanges gradients between data-parallel ranks, once a step."""

    def step(self) -> AbstractContextManager[object]:
        """The context of all forward and backward passes of a step; gradients are complete after it."""
        ...


class NoStepSync:
    """One data-parallel rank: nothing travels."""

    def step(self) -> AbstractContextManager[object]:
        """Nothing to do."""
        return nullcontext()


class SumOverReplicas:
    """Replicas add up their gradients after the last micro-batch.

    DDP would have to be told which backward pass of which stage is the last one; under zero bubble that is none.
    """

    def __init__(self, module: nn.Module, group: dist.ProcessGroup | None) -> None:
        self._module, self._group = module, group

    @contextmanager
    def step(self) -> Iterator[None]:
        """Leave gradients local until the end."""
        yield
        grads = [local(p.grad) for p in self._module.parameters() if p.grad is not None]
        for work in [dist.all_reduce(grad, group=self._group, async_op=True) for grad in grads]:
            assert work is not None
            work.wait()


class FsdpOnceAStep:
    """FSDP gathers weights once a step and scatters gradients once, whatever the ZeRO stage.

    Micro-batches of several stages overlap, so there is no moment within a step at which a layer's weights are not
    about to be used.
    """

    def __init__(self, root: FSDPModule, device: torch.device, group: dist.ProcessGroup) -> None:
        assert isinstance(root, nn.Module)
        self._root = root
        # A stage that never runs: PyTorch's own way of letting FSDP reduce after a schedule belongs to a stage whose
        # module is the FSDP root, and here two stages may share one.
        self._reducing = PipelineStage(root, 0, group.size(), device, group=group)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Keep gathered weights and whole gradients until the end."""
        self._root.set_is_last_backward(False)
        self._root.set_reshard_after_backward(False)
        self._root.set_requires_gradient_sync(False)
        yield
        self._reducing.perform_reduce_grad(1)


class _StageModule(nn.Module):
    """What a stage calls: the number of the micro-batch is set before each call."""

    def __init__(self, part: Part, forward: StageForward) -> None:
        super().__init__()
        self.number = 0
        self._part, self._run = part, forward
        self.owned = nn.ModuleList(part.modules())  # zero bubble asks a stage for its parameters

    def forward(self, *received: Tensor) -> Tensor | tuple[Tensor, ...]:
        """received: what the stage before sent; the first stage gets a number that nobody reads."""
        outputs = self._run(self._part, self.number, () if self._part.is_first else received)
        # Zero bubble detaches what a stage has sent, in place, which a view does not allow; strides are as was told.
        outputs = tuple(output.clone() if output._is_view() else output for output in map(Tensor.contiguous, outputs))
        return outputs[0] if len(outputs) == 1 else outputs


class _Stage(PipelineStage):
    """A stage that tells its module which micro-batch it is called with, and sends and receives by lanes, if any."""

    lanes: Lanes | None = None

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """As PyTorch's."""
        assert isinstance(self.submod, _StageModule)
        self.submod.number = fwd_chunk_id
        return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """As PyTorch's."""
        return self._by_lane(super().get_fwd_recv_ops(fwd_chunk_id), "forward", self.stage_index - 1)

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """As PyTorch's."""
        return self._by_lane(super().get_fwd_send_ops(fwd_chunk_id), "forward", self.stage_index)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """As PyTorch's."""
        return self._by_lane(super().get_bwd_recv_ops(bwd_chunk_id), "backward", self.stage_index)

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """As PyTorch's."""
        return self._by_lane(super().get_bwd_send_ops(bwd_chunk_id), "backward", self.stage_index - 1)

    def _by_lane(self, ops: list[dist.P2POp], way: Way, source: int) -> list[dist.P2POp]:
        """The same messages by the lane of the edge that begins at a stage; its ranks are numbered as the group's."""
        if self.lanes is not None:
            for op in ops:
                op.group = self.lanes.of(way, source % self.lanes.ranks)
        return ops

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        # torch 2.11 greets both neighbours before the first step, and in zbv the one rank that has two stages in a
        # row would greet itself, which gloo cannot. 2.13 does not call this.
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.peer != dist.get_rank()]


class Pipeline:
    """The stages of one rank, and the order in which they work.

    Attributes:
        cut: the stages.
    """

    def __init__(self, cut: StageCut, mesh: Mesh, sync: StepSync) -> None:
        self.cut = cut
        self._layout, self._device, self._sync = mesh.layout, mesh.device, sync
        group = mesh.group(("pp",))
        assert group is not None, "a pipeline has several ranks"
        self._group = group
        self._lanes = open_lanes(mesh) if mesh.layout.overlaps_p2p else None

    def count(self, wanted: int) -> int:
        """The least number of micro-batches from `wanted` on that the schedule can run."""
        return round_microbatches(self._layout, wanted)

    def run(self, count: int, wires: Sequence[Wire], forward: StageForward) -> None:
        """Forward and, where gradients are enabled, backward of all micro-batches of a step.

        Args:
            count: of micro-batches, as `count` allows.
            wires: what goes from stage to stage.
            forward: runs a stage; it is called for every micro-batch, in order, and its losses are differentiated.
        """
        if not torch.is_grad_enabled():
            self._run_forward(count, wires, forward)
            return
        schedule = self._schedule(count, wires, forward)
        numbers = torch.arange(count, device=self._device)
        inputs = (numbers,) if any(part.is_first for part in self.cut.parts) else ()
        target = numbers if any(part.is_last for part in self.cut.parts) else None
        with self._sync.step():
            schedule.step(*inputs, target=target, return_outputs=False)

    def _run_forward(self, count: int, wires: Sequence[Wire], forward: StageForward) -> None:
        """Forward passes alone, which PyTorch's V-shaped schedule does not have.

        A rank finishes a micro-batch before it begins the next: with one stage a rank that keeps all of them busy.
        """
        for number in range(count):
            outputs: tuple[Tensor, ...] = ()
            for part in self.cut.parts:
                if not part.is_first and (before := self._rank_of(part.index - 1)) != dist.get_rank():
                    outputs = tuple(torch.empty(shape, dtype=dtype, device=self._device) for shape, dtype in wires)
                    for tensor in outputs:
                        dist.recv(tensor, before, self._group)
                outputs = forward(part, number, outputs)
                if not part.is_last and (after := self._rank_of(part.index + 1)) != dist.get_rank():
                    for tensor in outputs:
                        dist.send(tensor.contiguous(), after, self._group)

    def _rank_of(self, stage: int) -> int:
        """The rank of the job that runs a stage of this pipeline."""
        return dist.get_global_rank(self._group, rank_of_stage(self._layout, stage))

    def _schedule(self, count: int, wires: Sequence[Wire], forward: StageForward) -> Any:
        stages = [self._stage(part, wires, forward) for part in self.cut.parts]
        # A last stage's output is its loss already.
        options: dict[str, Any] = {"scale_grads": False, "loss_fn": lambda output, number: output}
        if len(stages) == 2:
            return _DOUBLE[self._layout.pp_schedule](list(stages), count, **options)
        return _SINGLE[self._layout.pp_schedule](stages[0], count, **options)

    def _stage(self, part: Part, wires: Sequence[Wire], forward: StageForward) -> _Stage:
        hidden = tuple(torch.empty(shape, dtype=dtype, device="meta", requires_grad=True) for shape, dtype in wires)
        loss = torch.empty((), device="meta", requires_grad=True)
        number = torch.empty(1, dtype=torch.int64, device="meta")
        stage = _Stage(
            _StageModule(part, forward),
            part.index,
            self.cut.num_stages,
            self._device,
            input_args=(number,) if part.is_first else hidden,
            output_args=(loss,) if part.is_last else hidden,
            group=self._group,
        )
        stage.lanes = self._lanes
        return stage
