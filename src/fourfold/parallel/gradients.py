"""When gradients travel: what a step tells its data-parallel engine before each micro-batch."""

# No postponed annotations here: DDP checks the annotation of a communication hook at run time.
import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

_BUCKET_MB = 100
_MOST_TOGETHER = 2**26
"""Numbers whose gradients may wait for each other before they are added: 256 MiB in fp32."""


class GradientSync(Protocol):
    """Steers the exchange of gradients within a step."""

    def micro_batch(self, *, last: bool) -> AbstractContextManager[object]:
        """The context of one micro-batch's forward and backward."""
        ...


class NoSync:
    """One rank: nothing travels."""

    def micro_batch(self, *, last: bool) -> AbstractContextManager[object]:
        """Nothing to do."""
        return nullcontext()


class DdpSync:
    """Replicas exchange gradients once a step, with the last micro-batch."""

    def __init__(self, wrapped: DistributedDataParallel) -> None:
        self._wrapped = wrapped

    def micro_batch(self, *, last: bool) -> AbstractContextManager[object]:
        """Gradients stay local until the last micro-batch."""
        return nullcontext() if last else self._wrapped.no_sync()


class FsdpSync:
    """Shards exchange gradients each micro-batch (stages 2 and 3) or once a step (stage 1, and replicas of shards).

    Under stage 1 and 2 gathered weights stay until the last backward pass of the step.
    """

    def __init__(self, root: FSDPModule, zero: int) -> None:
        self._root, self._zero = root, zero

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Set what happens after this micro-batch's backward pass."""
        self._root.set_is_last_backward(last)
        self._root.set_requires_all_reduce(last)
        if self._zero == 1:
            self._root.set_requires_gradient_sync(last)
        if self._zero < 3:
            self._root.set_reshard_after_backward(last)
        yield


def add_gradients(loss: Tensor, parameters: Sequence[nn.Parameter]) -> None:
    """What `loss.backward()` does, but many small gradients, which must be there already, are added by a few kernels.

    Nothing that waits for single gradients (DDP, FSDP) hears of it.
    """
    if sum(parameter.numel() for parameter in parameters) > _MOST_TOGETHER:
        loss.backward()
        return
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    places: list[Tensor] = []
    added: list[Tensor] = []
    for parameter, new in zip(parameters, found, strict=True):
        if new is not None:
            assert parameter.grad is not None
            places.append(parameter.grad)
            added.append(new)
    if added:
        torch._foreach_add_(places, added)  # pyright: ignore[reportPrivateImportUsage]


def replicate(module: nn.Module, group: dist.ProcessGroup | None) -> DistributedDataParallel:
    """Wrap a module that is the same on every rank of a group; gradients are summed, not averaged."""
    # torch 2.13 renamed the switch for sending buffers before every forward pass; 2.11 knows the old name only.
    names = inspect.signature(DistributedDataParallel).parameters
    no_buffers: dict[str, Any] = {
        "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers": False
    }
    wrapped = DistributedDataParallel(
        module,
        process_group=group,
        # Every rank has loaded the same weights and seeded the same adapters; nothing needs to be sent.
        init_sync=False,
        gradient_as_bucket_view=True,
        # Few large buckets: each costs a call back into Python, and large messages use the link best.
        bucket_cap_mb=_BUCKET_MB,
        **no_buffers,
    )

    def add_up(
        state: object,
        bucket: dist.GradBucket,  # pyright: ignore[reportPrivateImportUsage]
    ) -> torch.futures.Future[Tensor]:
        work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
        assert work is not None
        return work.get_future().then(lambda future: future.value()[0])

    wrapped.register_comm_hook(None, add_up)
    return wrapped
