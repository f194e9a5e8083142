"""In which dtype a run computes, holds its frozen weights and keeps its masters."""

from __future__ import annotations

import platform
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fourfold.base.log import get_logger
from fourfold.config.schema import Run
from fourfold.parallel.sharded import local
from fourfold.parallel.stacked_experts import find_experts

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Precision:
    """Dtypes of a run.

    Attributes:
        compute: of matrix products.
        load: of the weights when they are loaded; trained ones are held in `master` afterwards.
        master: of trained weights and the optimizer; None to leave them as loaded (pure_bf16).
        loss_scaling: whether gradients are scaled against fp16's underflow.
    """

    compute: torch.dtype
    load: torch.dtype
    master: torch.dtype | None
    loss_scaling: bool

    @property
    def narrow(self) -> torch.dtype | None:
        """The compute dtype where masters are wider; None where they are not."""
        return None if self.compute == torch.float32 or self.master is None else self.compute

    def autocast(self, device: torch.device) -> Callable[[], AbstractContextManager[object]]:
        """The context of a forward pass: casts to the compute dtype where masters are wider."""
        return nullcontext if self.narrow is None else lambda: torch.autocast(device.type, self.compute)


def resolve(run: Run) -> Precision:
    """The dtypes that bf16, fp16, pure_bf16 and the kind of tuning ask for.

    Trained weights are kept in fp32 unless pure_bf16; frozen ones are loaded in the compute dtype.
    """
    training = run.training
    if training.pure_bf16:
        return Precision(torch.bfloat16, torch.bfloat16, None, loss_scaling=False)
    compute = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32
    load = torch.float32 if run.tuning.finetuning_type == "full" else compute
    return Precision(compute, load, torch.float32, loss_scaling=compute == torch.float16)


def warn_of_slow(run: Run, precision: Precision, device: torch.device) -> None:
    """Warn of bf16 on a CPU that has no instructions for it, and emulates each product."""
    if precision.compute != torch.bfloat16 or device.type != "cpu" or multiplies_bf16():
        return
    key = "pure_bf16" if run.training.pure_bf16 else "bf16"
    log.warning(
        "%s: this CPU has no instructions for bf16 (AVX512-BF16, AMX), so that it is many times slower than fp32. "
        "Use %s: false.",
        key,
        key,
    )


def multiplies_bf16() -> bool:
    """Whether this CPU has instructions for products in bf16; of others than x86 it is taken for granted."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


class LossScaler(torch.amp.GradScaler):
    """torch's loss scaler, for gradients of which each rank may hold a part: an overflow on one is one on all.

    Otherwise the others would update their part of the weights, and go on with another scale.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device.type)
        self.scale(torch.zeros((), device=device))  # makes the scale, also on pipeline stages that see no loss

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        """Divide what this rank holds of the gradients by the scale, in place; every rank must call."""
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        grads: dict[torch.dtype, list[Tensor]] = {}
        for grad in (local(p.grad) for p in parameters if p.grad is not None):
            assert allow_fp16 or grad.dtype != torch.float16, "masters are wider than fp16"
            grads.setdefault(grad.dtype, []).append(grad)
        for alike in grads.values():
            torch._amp_foreach_non_finite_check_and_unscale_(  # pyright: ignore[reportPrivateImportUsage]
                alike, found_inf, inv_scale
            )
        if dist.is_initialized():
            dist.all_reduce(found_inf, op=dist.ReduceOp.MAX)
        return {found_inf.device: found_inf}


def narrow_outputs(model: nn.Module, dtype: torch.dtype) -> None:
    """Let embeddings and norms whose masters are wider than `dtype` give their outputs in it.

    Autocast casts the operands of products only: beside fp32 masters what flows from layer to layer would stay fp32,
    twice the bytes, and each product would keep a copy of its own. This is what FSDP's mixed precision computes.
    """

    def narrow(module: nn.Module, args: object, output: object) -> object:
        if not isinstance(output, Tensor) or output.dtype != torch.float32:
            return output
        return output.to(dtype) if torch.is_autocast_enabled(output.device.type) else output

    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if own and (isinstance(module, nn.Embedding) or all(p.ndim == 1 for p in own)):
            module.register_forward_hook(narrow)


def cast_experts(model: nn.Module, dtype: torch.dtype) -> None:
    """Let stacked experts whose masters are wider than `dtype` compute in it, as autocast has linear layers do.

    Autocast does not know grouped products; they would run in the dtype of the masters.
    """
    for _, experts in find_experts(model):
        # the class is exchanged: a compiler makes a function in a module's `forward` anew for each layer
        experts.__class__ = _casting_class(type(experts), dtype)


@lru_cache(maxsize=16)
def _casting_class(experts: type[nn.Module], dtype: torch.dtype) -> type[nn.Module]:
    """A class of experts whose parameters are cast first under autocast."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        own = self._parameters
        kept = {name: p for name, p in own.items() if p is not None and p.dtype == torch.float32}
        if not kept or not torch.is_autocast_enabled(next(iter(kept.values())).device.type):
            return experts.forward(self, *args, **kwargs)
        try:
            own.update({name: p.to(dtype) for name, p in kept.items()})  # type: ignore[misc]
            return experts.forward(self, *args, **kwargs)
        finally:
            own.update(kept)

    return type(experts.__name__, (experts,), {"forward": forward})
