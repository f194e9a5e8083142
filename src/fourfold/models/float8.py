"""Linear layers of trained weights whose products run in float8: twice the rate of 16 bits where a GPU has it.

Each operand is scaled by one number, the largest magnitude that it has at the moment, and cast: activations and weights
to e4m3, gradients to e5m2 (Micikevicius et al. 2022, arXiv 2209.05433). Results, sums, norms, attention, the head and
the optimizer stay as they are; a master in fp32 is cast straight to float8, in both layouts that products want, by a
kernel of our own. The largest magnitudes take passes over memory that only a compiler can join with what comes before,
so layers are compiled.

The scale is of a micro-batch's tensor, or of a rank's part of one: how a step is cut changes the last digits of float8,
as nothing does in wider formats.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

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


def _scale(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """What numbers of a format are multiplied by: the largest magnitude becomes the format's own."""
    return amax.clamp(min=1e-12) / torch.finfo(dtype).max


def _amax(values: Tensor) -> Tensor:
    return values.detach().abs().amax().float()


def _cast(
    values: Tensor, amax: Tensor, dtype: torch.dtype, *, rows: bool = False, columns: bool = False
) -> tuple[Tensor, Tensor]:
    """values [M, N] / scale as they lie [M, N], and transposed [N, M]; empty if not wanted."""
    if values.is_cuda and _KERNEL:
        return torch.ops.fourfold.to_float8(values, amax, dtype, rows, columns)
    limit = torch.finfo(dtype).max
    narrow = (values.float() / _scale(amax, dtype)).clamp(-limit, limit).to(dtype)
    nothing = narrow.new_empty(0)
    return narrow if rows else nothing, narrow.t().contiguous() if columns else nothing


class _Product(torch.autograd.Function):
    """y = x W^T, and its gradients, each product of two operands in float8.

    The kernel takes a first operand row by row and a second one column by column. Of x the columns are kept, a byte a
    number.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """x [T, in] in 16 bits, weight [out, in] in any dtype -> [T, out] as x."""
        of_x, of_weight = _amax(x), _amax(weight)
        rows, columns = _cast(x, of_x, _ACTIVATIONS, rows=True, columns=True)
        weight_rows, _ = _cast(weight, of_weight, _ACTIVATIONS, rows=True)
        ctx.save_for_backward(columns, weight, of_x, of_weight)
        of_x, of_weight = _scale(of_x, _ACTIVATIONS), _scale(of_weight, _ACTIVATIONS)
        return _scaled(rows, weight_rows, of_x, of_weight, x.dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """grad [T, out]."""
        x_columns, weight, of_x, of_weight = ctx.saved_tensors
        wants_x, wants_weight = ctx.needs_input_grad
        of_grad = _amax(grad)
        rows, columns = _cast(grad, of_grad, _GRADIENTS, rows=wants_x, columns=wants_weight)
        scale, grad_x, grad_weight = _scale(of_grad, _GRADIENTS), None, None
        if wants_x:
            _, weight_columns = _cast(weight, of_weight, _ACTIVATIONS, columns=True)
            grad_x = _scaled(rows, weight_columns, scale, _scale(of_weight, _ACTIVATIONS), grad.dtype)
        if wants_weight:
            grad_weight = _scaled(columns, x_columns, scale, _scale(of_x, _ACTIVATIONS), weight.dtype)
        return grad_x, grad_weight


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
