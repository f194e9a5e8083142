"""Reductions over ranks: denominators, reported sums, counts, and the gradient norm."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fourfold.base.triton import has_triton
from fourfold.dataset.batch import to_device
from fourfold.parallel.sharded import full, local
from fourfold.parallel.shares import Share

_Found = TypeVar("_Found")

_LARGE = 2**20
"""Numbers of a tensor that is read by a kernel of its own."""


@dataclass(frozen=True, slots=True)
class Reducer:
    """Adds up what ranks found; with no group, what one rank found is all there is.

    Attributes:
        group: the ranks whose losses add up (data- and context-parallel ones), None for one.
        data: the ranks that have different samples, None for one.
        world: all ranks of the job, None for one.
        pipeline: the ranks of this rank's pipeline, None for one.
        loss_rank: which of them (of the job) has the last stage, which alone sees a loss.
    """

    group: dist.ProcessGroup | None = None
    data: dist.ProcessGroup | None = None
    world: dist.ProcessGroup | None = None
    pipeline: dist.ProcessGroup | None = None
    loss_rank: int = 0

    def from_last_stage(self, found: _Found) -> _Found:
        """What the rank of the last stage found, on every rank of its pipeline."""
        if self.pipeline is None:
            return found
        box = [found]
        dist.broadcast_object_list(box, self.loss_rank, self.pipeline, device=torch.device("cpu"))
        return box[0]

    def sums(self, values: Mapping[str, float]) -> dict[str, float]:
        """What each rank computed, summed; every rank must give the same names."""
        return _summed(values, self.group)

    def counts(self, values: Mapping[str, float]) -> dict[str, float]:
        """What each rank counted on its whole samples, summed over the ranks that have different ones."""
        return _summed(values, self.data)

    def largest(self, value: int) -> int:
        """The largest value over all ranks of the job."""
        if self.world is None:
            return value
        found = torch.tensor([value])
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.world)
        return int(found)


def _summed(values: Mapping[str, float], group: dist.ProcessGroup | None) -> dict[str, float]:
    if group is None:
        return dict(values)
    names = sorted(values)
    # On the host, by gloo. In fp64 counts stay exact, and sums hardly depend on the number of ranks.
    total = torch.tensor([values[name] for name in names], dtype=torch.float64)
    dist.all_reduce(total, group=group)
    return dict(zip(names, total.tolist(), strict=True))


class GradientNorm(Protocol):
    """Measures the gradients of parameters, each of which may be spread over ranks; every rank must call."""

    def __call__(self, parameters: Sequence[nn.Parameter], /) -> Tensor:
        """The 2-norm of all gradients over all ranks, a scalar on the device."""
        ...


@dataclass(frozen=True, slots=True)
class Spread:
    """How the gradients of a job lie on its ranks, where tensor, expert or pipeline parallelism cuts parameters.

    Attributes:
        shares: of the parameters that are cut.
        ranks_per_stage: ranks of the job divided by its pipeline stages.
        device: of each rank; where their norms are added up, so that it need not be waited for.
    """

    shares: Mapping[nn.Parameter, Share]
    ranks_per_stage: int
    device: torch.device


@torch.no_grad()
def gradient_norm(parameters: Iterable[nn.Parameter], *, spread: Spread | None = None) -> Tensor:
    """The 2-norm of all gradients, over all ranks.

    Args:
        spread: None where no parameter is cut but by FSDP.
    Returns:
        a scalar on the gradients' device, which is not waited for; 0 without gradients.
    """
    held = [p for p in parameters if p.grad is not None]
    if spread is not None:
        return _norm_of_shares(held, spread)
    grads = [p.grad for p in held if p.grad is not None]
    return _norm(grads) if grads else torch.zeros(())


def _norm(grads: Sequence[Tensor]) -> Tensor:
    """The 2-norm of tensors, a scalar on their device, whatever of them is on other ranks."""
    device, norms = grads[0].device, []
    for (_, dtype, is_large), alike in _alike(grads).items():
        if is_large:
            from fourfold.parallel.norm_kernel import square_sums

            norms.append(square_sums(alike).sum().sqrt())
        else:
            # not in 16 bits, as PyTorch leaves it: that is half a percent, and clips by it
            wide = torch.promote_types(dtype, torch.float32)
            norms += torch._foreach_norm(alike, 2, dtype=wide)  # pyright: ignore[reportPrivateImportUsage]
    return full(torch.linalg.vector_norm(torch.stack([norm.to(device) for norm in norms])))


def _alike(grads: Sequence[Tensor]) -> dict[tuple[torch.device, torch.dtype, bool], list[Tensor]]:
    """Gradients by device and dtype, those apart that have a kernel of their own."""
    found: dict[tuple[torch.device, torch.dtype, bool], list[Tensor]] = {}
    for grad in grads:
        found.setdefault((grad.device, grad.dtype, _is_large(grad)), []).append(grad)
    return found


def _is_large(grad: Tensor) -> bool:
    """Whether a gradient is worth a kernel of its own, and can have it."""
    plain = grad.is_cuda and not isinstance(grad, DTensor) and grad.is_contiguous()
    return plain and grad.numel() >= _LARGE and has_triton()


@torch.no_grad()
def clip_factor(norm: Tensor, max_norm: float) -> Tensor | None:
    """What gradients of a 2-norm are multiplied by for one of at most `max_norm`: a scalar beside it, at most 1.

    None, for leaving them alone, if `max_norm` is 0.
    """
    if max_norm <= 0:
        return None
    # The same factor as torch's clip_grad_norm_, so that curves are comparable to the last digit.
    return torch.clamp(max_norm / (norm + 1e-6), max=1.0)


@torch.no_grad()
def scale_gradients(parameters: Iterable[nn.Parameter], factor: Tensor) -> None:
    """Multiply gradients in place by a scalar; this rank's parts of them, on whatever devices they are."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            grad = local(parameter.grad)
            by_device.setdefault(grad.device, []).append(grad)
    for device, grads in by_device.items():
        torch._foreach_mul_(grads, factor.to(device))  # pyright: ignore[reportPrivateImportUsage]


def clip_gradients(
    parameters: Iterable[nn.Parameter], max_norm: float, *, measure: GradientNorm = gradient_norm
) -> Tensor:
    """Scale gradients in place so that their 2-norm is at most `max_norm`; 0 leaves them alone.

    Returns:
        the norm before clipping, over all ranks, a scalar on the gradients' device.
    """
    held = [p for p in parameters if p.grad is not None]
    norm = measure(held)
    factor = clip_factor(norm, max_norm)
    if factor is not None:
        scale_gradients(held, factor)
    return norm


def _norm_of_shares(parameters: Sequence[nn.Parameter], spread: Spread) -> Tensor:
    """The norm over all ranks, each entry counted once though several ranks may hold it."""
    alike: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[float]]] = {}
    for parameter in parameters:
        assert parameter.grad is not None
        share, grad = spread.shares.get(parameter), local(parameter.grad)
        parts, stages = (1, 1) if share is None else (share.parts, share.stages)
        grads, weights = alike.setdefault((grad.device, grad.dtype), ([], []))
        grads.append(grad)
        weights.append(parts * _fsdp_parts(parameter) / (spread.ranks_per_stage * stages))
    # fp64: the weights are fractions, and the sum must hardly depend on the number of ranks.
    total = torch.zeros(1, dtype=torch.float64, device=spread.device)
    for grads, weights in alike.values():
        # in a few kernels: by two for each of an adapter's hundreds of small tensors a GPU waited 30 ms a step
        wide = torch.promote_types(grads[0].dtype, torch.float32)
        norms = torch._foreach_norm(grads, 2, dtype=wide)  # pyright: ignore[reportPrivateImportUsage]
        squares = torch.stack(norms).double().square().to(spread.device)
        total += squares @ to_device(torch.tensor(weights, dtype=torch.float64), spread.device)
    dist.all_reduce(total)
    norm = total.sqrt().float().squeeze(0)
    return norm.to(parameters[0].device) if parameters else norm


def _fsdp_parts(parameter: nn.Parameter) -> int:
    """Into how many different parts FSDP cuts a parameter."""
    if not isinstance(parameter, DTensor):
        return 1
    sizes = zip(parameter.placements, parameter.device_mesh.shape, strict=True)
    return math.prod(size for placement, size in sizes if placement.is_shard())
