"""Linear layers of trained weights whose products run in float8: twice the rate of 16 bits where a GPU has it.

Each operand is scaled by one number, the largest magnitude that it has at the moment, and cast: activations and weights
to e4m3, gradients to e5m2 (Micikevicius et al. 2022, arXiv 2209.05433). Results, sums, norms, attention, the head and
the optimizer stay as they are; a master in fp32 is cast straight to float8. Casts are passes over memory that only a
compiler can join with what comes before, so layers are compiled.

The scale is of a micro-batch's tensor, or of a rank's part of one: how a step is cut changes the last digits of float8,
as nothing does in wider formats.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

MULTIPLE = 16
"""What positions, rows and columns of a product in float8 must be a multiple of."""


def _quantised(values: Tensor, dtype: torch.dtype, amax: Tensor) -> tuple[Tensor, Tensor]:
    """values / scale in `dtype`, and the scale, fp32, by which the largest magnitude becomes the format's own."""
    limit = torch.finfo(dtype).max
    scale = amax.clamp(min=1e-12) / limit
    return (values.float() / scale).clamp(-limit, limit).to(dtype), scale


def _amax(values: Tensor) -> Tensor:
    return values.detach().abs().amax().float()


class _Product(torch.autograd.Function):
    """y = x W^T, and its gradients, each product of two operands in float8."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """x [T, in] in 16 bits, weight [out, in] in any dtype -> [T, out] as x."""
        of_x, of_weight = _amax(x), _amax(weight)
        narrow_x, scale_x = _quantised(x, torch.float8_e4m3fn, of_x)
        narrow_weight, scale_weight = _quantised(weight, torch.float8_e4m3fn, of_weight)
        ctx.save_for_backward(x, weight, of_x, of_weight)
        return _scaled(narrow_x, narrow_weight.t(), scale_x, scale_weight, x.dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """grad [T, out]."""
        x, weight, of_x, of_weight = ctx.saved_tensors
        narrow_grad, scale_grad = _quantised(grad, torch.float8_e5m2, _amax(grad))
        grad_x = grad_weight = None
        # the kernel takes a first operand row by row and a second one column by column, so each is laid out anew
        if ctx.needs_input_grad[0]:
            narrow_weight, scale = _quantised(weight, torch.float8_e4m3fn, of_weight)
            columns = narrow_weight.t().contiguous().t()
            grad_x = _scaled(narrow_grad, columns, scale_grad, scale, grad.dtype)
        if ctx.needs_input_grad[1]:
            narrow_x, scale = _quantised(x, torch.float8_e4m3fn, of_x)
            rows, columns = narrow_grad.t().contiguous(), narrow_x.t().contiguous().t()
            grad_weight = _scaled(rows, columns, scale_grad, scale, grad.dtype).to(weight.dtype)
        return grad_x, grad_weight


def _scaled(
    left: Tensor, right: Tensor, of_left: Tensor, of_right: Tensor, dtype: torch.dtype, *, fast: bool = False
) -> Tensor:
    """left [M, K] right [K, N] with their scales.

    Args:
        fast: sum up in the tensor cores' own registers, which is less exact; usual for the forward pass alone.
    """
    if left.device.type == "cpu":  # whose own kernel for float8 is a loop; autocast leaves fp64 alone
        return (torch.mm(left.double(), right.double()) * (of_left * of_right)).to(dtype)
    product: Any = torch._scaled_mm  # pyright: ignore[reportPrivateImportUsage] - the public one is newer than 2.9
    return product(left, right, scale_a=of_left, scale_b=of_right, out_dtype=dtype, use_fast_accum=fast)


class Float8Linear(nn.Linear):
    """A linear layer whose products are in float8."""

    def forward(self, input: Tensor) -> Tensor:
        """input [..., in] -> [..., out]."""
        device = input.device.type
        compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
        out = _Product.apply(input.reshape(-1, input.shape[-1]).to(compute), self.weight)
        assert isinstance(out, Tensor)
        out = out if self.bias is None else out + self.bias.to(compute)
        return out.view(*input.shape[:-1], out.shape[-1])


def use_float8(blocks: Iterable[nn.Module], *, parts: int = 1) -> int:
    """Let the trained linear layers of some blocks multiply in float8, in place: their class is exchanged.

    Args:
        parts: of a matrix, where ranks share it; each part must be of a size that the kernel takes.
    Returns:
        how many layers do.
    """
    count = 0
    for block in blocks:
        for layer in block.modules():
            if type(layer) is not nn.Linear or not layer.weight.requires_grad:
                continue
            if all(size % (MULTIPLE * parts) == 0 for size in (layer.in_features, layer.out_features)):
                layer.__class__ = Float8Linear
                count += 1
    return count
