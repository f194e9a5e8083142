"""AdamW with decoupled weight decay (arXiv:1711.05101), PyTorch's own; on CUDA it clips as it reads the gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from fourfold.base.triton import has_triton
from fourfold.config.schema import Run
from fourfold.models.masters import copy_of
from fourfold.parallel.reduce import scale_gradients
from fourfold.parallel.sharded import local

KERNEL_NUMBERS = 1 << 20
"""Numbers from which on a tensor has a launch of its own: it takes the host 10 to 20 us, the device as long."""

_OTHER_KINDS = ("amsgrad", "maximize", "capturable", "differentiable", "foreach")
"""Settings of torch's AdamW for which there is no kernel here."""


def _is_plain(settings: dict[str, Any]) -> bool:
    """Whether settings, of the optimizer or of a group, ask for torch's fused AdamW and nothing else."""
    return bool(settings["fused"]) and not any(map(settings.get, _OTHER_KINDS))


class _Entry(NamedTuple):
    """This rank's part of a parameter, with what belongs to it."""

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor

    @property
    def is_large(self) -> bool:
        """Whether it is worth a launch of its own, which takes contiguous tensors."""
        tensors = (self.param, self.grad, self.exp_avg, self.exp_avg_sq)
        is_there = self.param.is_cuda and self.param.numel() >= KERNEL_NUMBERS
        return is_there and all(tensor.is_contiguous() for tensor in tensors)


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW that multiplies gradients by a factor as it reads them.

    Named as torch's own, since its state is the same: a checkpoint of either resumes with the other. After a step the
    gradients of small tensors are multiplied, as torch's kernel leaves them, and those of large ones are as they were.
    """

    _factor: Tensor | None = None

    def scale_gradients_by(self, factor: Tensor | None) -> None:
        """Multiply the gradients of the next step, and of no other, by a scalar; None for leaving them alone."""
        self._factor = factor

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient; skipped on the device where a loss scaler found an overflow."""
        assert closure is None, "gradients are there already"
        factor, self._factor = self._factor, None
        if not all(map(_is_plain, self.param_groups)):
            if factor is not None:  # a saved state's settings, which torch prefers to ours
                scale_gradients((p for group in self.param_groups for p in group["params"]), factor)
            super().step()
            return
        # A loss scaler sets these for the time of the step.
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if grad_scale is not None:
            inverse = grad_scale.double().reciprocal().float()
            factor = inverse if factor is None else factor * inverse
        for group in self.param_groups:
            entries = self._entries(group)
            _update_large([entry for entry in entries if entry.is_large], group, factor, found_inf)
            _update_small([entry for entry in entries if not entry.is_large], group, factor, found_inf)

    def _entries(self, group: dict[str, Any]) -> list[_Entry]:
        """What is to be updated; a parameter's first gradient makes its state, as torch does."""
        params, grads, exp_avgs, exp_avg_sqs, steps = [], [], [], [], []
        self._init_group(group, params, grads, exp_avgs, exp_avg_sqs, [], steps)
        rows = zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True)
        return [_Entry(*(local(tensor) for tensor in row)) for row in rows]


def _update_large(
    entries: list[_Entry], group: dict[str, Any], factor: Tensor | None, found_inf: Tensor | None
) -> None:
    """Update tensors by a launch each."""
    if not entries:
        return
    from fourfold.parallel.adamw_kernel import update_adamw

    steps = [entry.step for entry in entries]
    beta1, beta2 = (_as_fp32(beta) for beta in group["betas"])
    lr, decay = float(group["lr"]), float(group["lr"]) * group["weight_decay"]
    torch._foreach_add_(steps, 1)  # pyright: ignore[reportPrivateImportUsage]
    rows = kernel_numbers(steps, lr=lr, beta1=beta1, beta2=beta2, factor=factor, found_inf=found_inf)
    for entry, numbers in zip(entries, rows.unbind(), strict=True):
        copy = copy_of(entry.param)  # torch does not see what the kernel writes
        update_adamw(*entry[:4], numbers, beta1=beta1, beta2=beta2, eps=group["eps"], decay=decay, copy=copy)
    if found_inf is not None:
        torch._foreach_sub_(steps, [found_inf] * len(steps))  # pyright: ignore[reportPrivateImportUsage]


def _update_small(
    entries: list[_Entry], group: dict[str, Any], factor: Tensor | None, found_inf: Tensor | None
) -> None:
    """Update tensors by few launches for all of them, torch's."""
    if not entries:
        return
    params, grads, exp_avgs, exp_avg_sqs, steps = (list(tensors) for tensors in zip(*entries, strict=True))
    beta1, beta2 = group["betas"]
    adamw(
        params, grads, exp_avgs, exp_avg_sqs, [], steps,
        fused=True,
        grad_scale=None if factor is None else factor.float().reciprocal(),  # what torch divides by
        found_inf=found_inf,
        amsgrad=False, maximize=False,
        beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
    )  # fmt: skip


def _as_fp32(beta: float) -> float:
    """The value that a kernel multiplies by, which the bias corrections must be of: at step 1 1 - beta is all of it."""
    return float(torch.tensor(beta, dtype=torch.float32))


def kernel_numbers(
    steps: list[Tensor], *, lr: float, beta1: float, beta2: float, factor: Tensor | None, found_inf: Tensor | None
) -> Tensor:
    """What the kernel reads for each of some tensors, made on their device without waiting for it.

    Args:
        steps: fp32 scalars, updates of each tensor, this one included.
        beta1, beta2: as the kernel gets them, in fp32.
        factor: what gradients are multiplied by, a scalar; None for 1.
        found_inf: a scalar, not 0 for skipping the update; None for 0.
    Returns:
        fp32 [tensors, 4]: lr / (1 - beta1^step), 1 / sqrt(1 - beta2^step), factor, found_inf. Powers are taken in fp64:
        their distance to 1 counts, which is 1e-3 at first.
    """
    step = torch.stack(steps).double()
    factors = torch.ones_like(step) if factor is None else factor.to(step).expand_as(step)
    skips = torch.zeros_like(step) if found_inf is None else found_inf.to(step).expand_as(step)
    rates = lr / (1 - torch.pow(beta1, step))
    roots = (1 - torch.pow(beta2, step)).rsqrt()
    return torch.stack((rates, roots, factors, skips), 1).float()


def build(groups: list[dict[str, Any]], model: nn.Module, run: Run) -> torch.optim.Optimizer:
    """AdamW over parameter groups; fused on CUDA, for-each elsewhere."""
    training = run.training
    on_cuda = any(p.is_cuda for group in groups for p in group["params"])
    settings: dict[str, Any] = {
        "betas": (training.adam_beta1, training.adam_beta2),
        "eps": training.adam_epsilon,
        "fused": on_cuda or None,
        **training.optim_args,
    }
    kind = AdamW if on_cuda and _is_plain(settings) and has_triton() else torch.optim.AdamW
    return kind(groups, lr=training.learning_rate, weight_decay=training.weight_decay, **settings)
