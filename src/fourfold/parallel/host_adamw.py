"""AdamW whose state and arithmetic stay on the host, while weights and gradients are wherever they are.

Of the 16 bytes that a trained fp32 parameter takes, 8 are Adam's moments; here they take host memory, or files. A step
moves each gradient to the host and its update back, piece by piece, so that little memory is needed besides.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fourfold.base.errors import ConfigError
from fourfold.base.units import format_bytes
from fourfold.parallel.sharded import local

PIECE = 1 << 24
"""Entries that are updated at one time: 64 MiB of fp32, large enough for the link's full speed."""


class AdamW(torch.optim.Optimizer):
    """AdamW (arXiv:1711.05101) on the host, by torch's fused kernel for CPUs.

    Named as torch's own, since its state is the same: `step`, `exp_avg` and `exp_avg_sq`, here in fp32 and shaped as
    the parameter's local part. A checkpoint of either resumes with the other.

    Args:
        groups: parameter groups; parameters may be plain or sharded by FSDP, on any device.
        folder: keep the moments in files of this folder (on a fast disk), mapped into memory; None for host memory.
            The files have no names: they are gone when the process ends, however it ends.
    Raises:
        ConfigError: the folder cannot hold them.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        folder: Path | None = None,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._files = None if folder is None else _Files(folder)
        make = torch.zeros if self._files is None else self._files.zeros
        # All at once, so that what does not fit is known before the first step.
        for parameter in self._parameters():
            shape = local(parameter.detach()).shape
            self.state[parameter] = {"step": torch.zeros(()), "exp_avg": make(shape), "exp_avg_sq": make(shape)}

    def _parameters(self) -> Iterator[nn.Parameter]:
        for group in self.param_groups:
            yield from group["params"]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient, one piece after the other."""
        assert closure is None, "gradients are there already"
        pieces = self._pieces()
        stage: _Stage | None = None
        ahead = next(pieces, None)
        while ahead is not None:
            piece, ahead = ahead, next(pieces, None)
            if piece.is_on_host:
                piece.update(piece.weight, piece.grad.float(), piece.weight_decay)
            else:
                stage = stage or _Stage(piece.weight.device)
                stage.update(piece, ahead)
            if piece.last and self._files is not None:
                self._files.release(piece.mean, piece.square)

    def _pieces(self) -> Iterator[_Piece]:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                state["step"] += 1
                tensors = (local(parameter.detach()), local(parameter.grad), state["exp_avg"], state["exp_avg_sq"])
                cut = list(zip(*map(_cut, tensors), strict=True)) if tensors[0].is_contiguous() else [tensors]
                for number, (weight, grad, mean, square) in enumerate(cut):
                    last = number == len(cut) - 1
                    yield _Piece(weight, grad.contiguous(), mean, square, state["step"], group, last)


def _cut(tensor: Tensor) -> tuple[Tensor, ...]:
    return tensor.reshape(-1).split(PIECE)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Some entries of a parameter, with what belongs to them.

    Attributes:
        weight, grad: on the parameter's device; the weight is updated in place.
        mean, square: Adam's moments, fp32, on the host.
        step: how many updates there were, this one included.
        last: whether the parameter ends with it.
    """

    weight: Tensor
    grad: Tensor
    mean: Tensor
    square: Tensor
    step: Tensor
    group: dict[str, Any]
    last: bool

    @property
    def is_on_host(self) -> bool:
        """Whether the kernel can update the weight itself."""
        weight = self.weight
        return weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.is_contiguous()

    @property
    def weight_decay(self) -> float:
        """Of the group."""
        return float(self.group["weight_decay"])

    def update(self, weight: Tensor, grad: Tensor, weight_decay: float) -> None:
        """Update moments and `weight` by `grad`; all fp32 on the host."""
        beta1, beta2 = self.group["betas"]
        torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage]
            [weight],
            [grad],
            [self.mean],
            [self.square],
            [],
            [self.step],
            lr=float(self.group["lr"]),
            beta1=beta1,
            beta2=beta2,
            weight_decay=weight_decay,
            eps=self.group["eps"],
            amsgrad=False,
            maximize=False,
        )


class _Stage:
    """Buffers through which pieces travel: the next gradient comes while this one is used.

    The weight itself does not travel: on zeros in its place the kernel leaves -(the step), which is added on the
    device; x + (0 - s) is rounded as x - s is.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._turn = device, 0
        on_gpu = device.type == "cuda"
        self._grads, self._steps = _Buffers(on_gpu), _Buffers(on_gpu)
        self._arrived = [torch.cuda.Event() for _ in range(2)] if on_gpu else []
        self._added = [torch.cuda.Event() for _ in range(2)] if on_gpu else []
        self._next: Tensor | None = None

    def _fetch(self, grad: Tensor, turn: int) -> Tensor:
        """Begin to copy a gradient to the host."""
        target = self._grads.take(grad, turn)
        target.copy_(grad.float(), non_blocking=True)
        if self._arrived:
            self._arrived[turn].record()
        return target

    def update(self, piece: _Piece, ahead: _Piece | None) -> None:
        """Update a piece, and begin with the gradient of the one after it."""
        turn, self._turn = self._turn, 1 - self._turn
        grad = self._fetch(piece.grad, turn) if self._next is None else self._next
        follows = ahead is not None and ahead.weight.device == self._device and not ahead.is_on_host
        self._next = self._fetch(ahead.grad, self._turn) if ahead is not None and follows else None
        if self._arrived:
            self._arrived[turn].synchronize()
            self._added[turn].synchronize()  # what was in this buffer two pieces ago has left it
        step = self._steps.take(piece.weight, turn).zero_()
        piece.update(step, grad, 0.0)
        piece.weight.mul_(1.0 - float(piece.group["lr"]) * piece.weight_decay)
        piece.weight.add_(step.to(self._device, non_blocking=True))
        if self._added:
            self._added[turn].record()


class _Buffers:
    """Two buffers on the host, fp32, used in turn; pinned where a GPU copies from and to them."""

    def __init__(self, pinned: bool) -> None:
        self._pinned, self._held = pinned, [torch.empty(0), torch.empty(0)]

    def take(self, like: Tensor, turn: int) -> Tensor:
        """A buffer in the shape of a tensor."""
        if self._held[turn].numel() < like.numel():
            self._held[turn] = torch.empty(like.numel(), pin_memory=self._pinned)
        return self._held[turn][: like.numel()].view(like.shape)


class _Files:
    """Tensors in nameless files of a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._maps: dict[int, mmap.mmap] = {}

    def zeros(self, shape: torch.Size) -> Tensor:
        """A tensor of zeros, fp32, whose memory is a file."""
        if not shape.numel():
            return torch.zeros(shape)
        size = shape.numel() * 4
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._folder) as file:
                # now, since a disk that turns out full when a page is written kills the process
                os.posix_fallocate(file.fileno(), 0, size)
                mapped = mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise ConfigError(
                f"parallel.offload_folder: {self._folder} cannot hold the optimizer's state "
                f"({error.strerror or error}; {format_bytes(size)} more are needed). Choose another folder."
            ) from error
        tensor = torch.frombuffer(mapped, dtype=torch.float32).view(shape)
        self._maps[tensor.untyped_storage().data_ptr()] = mapped
        return tensor

    def release(self, *tensors: Tensor) -> None:
        """Let the system take the pages of tensors back; it writes them to the disk when it needs the memory."""
        for tensor in tensors:
            mapped = self._maps.get(tensor.untyped_storage().data_ptr())
            if mapped is not None:
                mapped.madvise(mmap.MADV_DONTNEED)
