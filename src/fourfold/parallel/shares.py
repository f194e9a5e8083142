"""Which share of a whole parameter a rank holds, before FSDP cuts that share further.

Tensor and expert parallelism replace a parameter by the part of it that this rank computes with: a plain, smaller
tensor, so that every layer (Transformers', PEFT's, bitsandbytes') runs as it is. What the part was cut from is noted
here, once, for whoever needs the whole: the gradient norm, checkpoints, loading.

A parameter that is not noted is held whole by every rank of its pipeline stage.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fourfold.parallel.sharded import local


@dataclass(frozen=True, slots=True)
class Cut:
    """Rows, columns or experts of a whole tensor.

    Attributes:
        dim: the dimension that is cut.
        ranges: [start, stop) of the whole, in the order in which they lie in the part; several for a fused matrix.
    """

    dim: int
    ranges: tuple[tuple[int, int], ...]

    def take(self, whole: Tensor) -> Tensor:
        """A copy of this part of a whole tensor (or of one that is cut along other dimensions already)."""
        pieces = [whole.narrow(self.dim, start, stop - start) for start, stop in self.ranges]
        # a copy, so that the whole can be freed
        return torch.cat(pieces, self.dim) if len(pieces) > 1 else pieces[0].clone()

    @property
    def size(self) -> int:
        """Entries along the dimension."""
        return sum(stop - start for start, stop in self.ranges)


@dataclass(frozen=True, slots=True)
class Share:
    """One parameter's part on this rank.

    Attributes:
        shape: of the whole parameter.
        cuts: at most one for each dimension; none if this rank holds all of it.
        parts: how many different parts the ranks of a stage hold together.
        stages: how many pipeline stages hold this parameter (2 for embeddings tied over the first and the last).
        sum_over: ranks whose gradients are partial sums that must be added up, once a step; None if each has it all.
    """

    shape: tuple[int, ...]
    cuts: tuple[Cut, ...] = ()
    parts: int = 1
    stages: int = 1
    sum_over: dist.ProcessGroup | None = None

    def take(self, whole: Tensor) -> Tensor:
        """This rank's part of a whole tensor, as a copy; `whole` itself where nothing is cut."""
        for cut in self.cuts:
            whole = cut.take(whole)
        return whole


class Shares:
    """The shares of a model's parameters, by the module that owns each; FSDP and wrappers leave modules as they are."""

    def __init__(self) -> None:
        self._noted: dict[nn.Module, dict[str, Share]] = {}

    def put(self, module: nn.Module, name: str, share: Share) -> None:
        """Note the share of `module.<name>`."""
        self._noted.setdefault(module, {})[name] = share

    def get(self, module: nn.Module, name: str) -> Share | None:
        """The noted share of `module.<name>`; None if it is held whole."""
        return self._noted.get(module, {}).get(name)

    def named(self, root: nn.Module) -> Iterator[tuple[str, nn.Parameter, Share | None]]:
        """Every parameter once, by its full name under `root`, with its share."""
        seen: set[int] = set()
        for prefix, module in root.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                yield f"{prefix}.{name}" if prefix else name, parameter, self.get(module, name)

    def by_parameter(self, root: nn.Module) -> dict[nn.Parameter, Share]:
        """The noted shares by parameter, as the parameters are now (FSDP exchanges them)."""
        return {parameter: share for _, parameter, share in self.named(root) if share is not None}

    @torch.no_grad()
    def add_up_gradients(self, root: nn.Module) -> None:
        """Complete the gradients that are partial sums; once a step, after its last backward pass."""
        waiting: dict[tuple[dist.ProcessGroup, torch.dtype], list[Tensor]] = {}
        for _, parameter, share in self.named(root):
            if share is None or share.sum_over is None:
                continue
            if parameter.grad is None:
                if share.stages == 1 or not parameter.requires_grad:
                    continue
                # a loss that reads no logits gives the last stage's copy of a tied embedding none, but the first's one
                parameter.grad = torch.zeros_like(parameter)
            grad = local(parameter.grad)
            waiting.setdefault((share.sum_over, grad.dtype), []).append(grad)
        for (group, _), grads in waiting.items():
            flat = torch.cat([grad.reshape(-1) for grad in grads])
            dist.all_reduce(flat, group=group)
            for grad, summed in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
                grad.copy_(summed.view_as(grad))
