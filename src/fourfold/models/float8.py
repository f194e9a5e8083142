"""Linear layers of trained weights whose products run in float8: twice the rate of 16 bits where a GPU has it.

Each operand is scaled by one number, the largest magnitude that it has at the moment, and cast: activations and weights
to e4m3, gradients to e5m2 (Micikevicius et al. 2022, arXiv 2209.05433). Results, sums, norms, attention, the head and
the optimizer stay as they are; a master in fp32 is cast straight to float8, in both layouts that products want. The
largest magnitudes and the casts are kernels of our own, a pass over memory each; what lies between products takes far
more of them where it is not compiled, so layers are. Layers of one input are one product: x is cast once for all.

The scale is of a micro-batch's tensor, or of a rank's part of one: how a step is cut changes the last digits of float8,
as nothing does in wider formats.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from fourfold.base.inductor import written_once
from fourfold.models.trained_linear import TrainedLinear, exchange

MULTIPLE = 16
"""What positions, rows and columns of a product in float8 must be a multiple of."""


_ACTIVATIONS, _GRADIENTS = torch.float8_e4m3fn, torch.float8_e5m2
"""Formats: weights are in that of activations."""


_KERNEL: list[str] = []
"""What the kernel that casts is called, once it is loaded."""


def _load_kernel() -> None:
    """Load the kernel where it can run: its import brings Triton along, and makes it an operator."""
    if torch.cuda.is_available() and not _KERNEL:
        with suppress(ImportError):  # PyTorch without Triton
            _KERNEL.append(import_module("fourfold.parallel.float8_kernel").__name__)


def _largest(parts: Sequence[Tensor]) -> Tensor:
    """Largest magnitudes of shares of some tensors, fp32 [n]."""
    if parts[0].is_cuda and _KERNEL:
        return torch.ops.fourfold.largest_magnitudes([part.detach() for part in parts])
    return torch.stack([part.detach().abs().amax().float() for part in parts])


def _cast(
    parts: Sequence[Tensor],
    largest: Tensor,
    dtype: torch.dtype,
    *,
    beside: bool = False,
    rows: bool = False,
    columns: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """values [M, N] / scale as they lie [M, N], and transposed [N, M], empty if not wanted, and the scale, fp32 [1].

    Args:
        parts: of the values, one below the other, or side by side; dimensions before the last are one.
        largest: magnitudes of shares of them; the largest of all becomes the format's largest number.
    """
    if parts[0].is_cuda and _KERNEL:
        return torch.ops.fourfold.to_float8(parts, largest, dtype, beside, rows, columns)
    limit = torch.finfo(dtype).max
    scale = largest.amax(0, keepdim=True).clamp(min=1e-12) / limit
    values = torch.cat([part.reshape(-1, part.shape[-1]) for part in parts], 1 if beside else 0)
    narrow = (values.float() / scale).clamp(-limit, limit).to(dtype)
    nothing = narrow.new_empty(0)
    return narrow if rows else nothing, narrow.t().contiguous() if columns else nothing, scale


class _Product(torch.autograd.Function):
    """y = x W^T for one weight or several, and its gradients, each product of two operands in float8.

    The kernel takes a first operand row by row and a second one column by column. Of x the columns are kept, a byte a
    number. Several weights have one scale, and their gradients one: float8 has an exponent for what is smaller.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """x [..., in] in 16 bits, weights [out, in] each in any dtype -> [..., out] each as x.

        x stays as it is until it is cast: what has become a view of two dimensions would be written for each argument.
        """
        of_weights = _largest(weights)
        x = written_once(x)
        rows, columns, scale_x = _cast([x], _largest([x]), _ACTIVATIONS, rows=True, columns=True)
        weight_rows, _, scale = _cast(weights, of_weights, _ACTIVATIONS, rows=True)
        ctx.save_for_backward(columns, scale_x, of_weights, *weights)
        out = _scaled(rows, weight_rows, scale_x, scale, x.dtype, fast=True).view(*x.shape[:-1], -1)
        # one result as it is: of several, each a view, none may be written in place
        return (out,) if len(weights) == 1 else out.split([weight.shape[0] for weight in weights], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """grads [..., out] each."""
        x_columns, scale_x, of_weights, *weights = ctx.saved_tensors
        wants_x, wants_weights = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:])
        grads = tuple(written_once(grad) for grad in grads)
        rows, columns, scale = _cast(
            grads, _largest(grads), _GRADIENTS, beside=True, rows=wants_x, columns=wants_weights
        )
        grad_x = None
        if wants_x:
            _, weight_columns, of_weight = _cast(weights, of_weights, _ACTIVATIONS, columns=True)
            grad_x = _scaled(rows, weight_columns, scale, of_weight, grads[0].dtype).view(*grads[0].shape[:-1], -1)
        if not wants_weights:
            return grad_x, *(None for _ in weights)
        of_all = _scaled(columns, x_columns, scale, scale_x, weights[0].dtype)
        return grad_x, *of_all.split([weight.shape[0] for weight in weights])


def _scaled(
    left: Tensor, right: Tensor, of_left: Tensor, of_right: Tensor, dtype: torch.dtype, *, fast: bool = False
) -> Tensor:
    """left [M, K] times right [N, K] transposed, with their scales.

    Args:
        fast: sum up in the tensor cores' own registers, which is less exact; usual for the forward pass alone.
    """
    if left.device.type == "cpu":  # whose own kernel for float8 is a loop; autocast leaves fp64 alone
        return (torch.mm(left.double(), right.double().t()) * (of_left * of_right)).to(dtype)
    product: Any = torch._scaled_mm  # pyright: ignore[reportPrivateImportUsage] - the public one is newer than 2.9
    return product(left, right.t(), scale_a=of_left, scale_b=of_right, out_dtype=dtype, use_fast_accum=fast)


class Float8Linear(TrainedLinear):
    """A linear layer whose products are in float8."""

    product = _Product.apply


def use_float8(blocks: Iterable[nn.Module], *, parts: int = 1) -> int:
    """Let the trained linear layers of some blocks multiply in float8, in place: their class is exchanged.

    Args:
        parts: of a matrix, where ranks share it; each part must be of a size that the kernel takes.
    Returns:
        how many layers do.
    """
    _load_kernel()
    multiple = MULTIPLE * parts
    return exchange(
        blocks, Float8Linear, lambda layer: layer.in_features % multiple == 0 and layer.out_features % multiple == 0
    )
