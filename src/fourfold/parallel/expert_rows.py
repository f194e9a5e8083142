"""Rows of tokens in the order of experts, and back to the tokens: each (token, choice) pair is a row.

Rows are sorted by expert once, and both the order and its inverse are kept: with them every gradient is read from where
it lies, as the results are. Left to autograd, the gradient of reading rows is adding rows into zeros, which takes
several passes and, on a GPU, atomic additions in no fixed order.

On a GPU by kernels of our own (parallel/rows_kernel.py), as operators; elsewhere the same arithmetic as PyTorch has it.

Shape legend: T tokens, K choices of each, H hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fourfold.base.inductor import written_once
from fourfold.base.triton import has_triton

_HAS_TRITON = has_triton()
"""Known before anything is compiled: a compiler cannot look for modules."""


def sort_choices(indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The (token, choice) pairs in the order of experts.

    Args:
        indices: [T, K], from 0 to 32,767.
    Returns:
        chosen: the expert of each row, [T K] int16.
        order: the pair of each row, [T K] int64; pair t K + j is choice j of token t.
        inverse: the row of each pair, [T, K] int64.
    """
    # of 16 bits, a radix sort takes a quarter of the passes that it takes of 64
    chosen, order = torch.sort(indices.reshape(-1).to(torch.int16), stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
    return chosen, order, inverse.view(indices.shape)


def count_choices(indices: Tensor, num_experts: int) -> Tensor:
    """How many choose each expert, [num_experts]; numbers beyond them stand for none.

    Args:
        indices: integers of any shape.
    Returns:
        numbers, of int32 on a GPU and fp32 elsewhere.
    """
    # as Transformers does it: histc takes floats alone on a CPU
    counted = indices.float() if indices.device.type in ("cpu", "mps") else indices.int()
    return torch.histc(counted, bins=num_experts, min=0, max=num_experts - 1)


def spread(tokens: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """Rows in the order of experts: tokens [T, H], `order` and `inverse` of `sort_choices` -> [T K, H]."""
    return _Spread.apply(tokens, order, inverse)  # type: ignore[return-value]


def combine(rows: Tensor, weights: Tensor, order: Tensor, inverse: Tensor, dtype: torch.dtype) -> Tensor:
    """The weighted sum of each token's rows: rows [T K, H], weights [T, K] -> [T, H] of `dtype`, summed in fp32 at
    least."""
    return _Combine.apply(rows, weights, order, inverse, dtype)  # type: ignore[return-value]


class _Spread(torch.autograd.Function):
    """Rows of tokens, in the order of experts; the gradient of a token is the sum of its rows'."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, order: Tensor, inverse: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """tokens [T, H], order [T K], inverse [T, K] -> [T K, H]."""
        ctx.save_for_backward(inverse)
        if _has_kernels(tokens):
            return torch.ops.fourfold.spread(written_once(tokens.contiguous()), inverse)
        return tokens[order // inverse.shape[1]]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """grad [T K, H]."""
        (inverse,) = ctx.saved_tensors
        return _sum(grad, inverse, None, grad.dtype), None, None


class _Combine(torch.autograd.Function):
    """out[t] = sum_j weights[t, j] * rows[inverse[t, j]]."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, rows: Tensor, weights: Tensor, order: Tensor, inverse: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """rows [T K, H], weights [T, K], order [T K], inverse [T, K] -> [T, H] of `dtype`."""
        # weights without a gradient are those of a router outside of what is trained
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, weights, order, inverse)
        ctx.rows_dtype = rows.dtype
        return _sum(rows, inverse, weights, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """grad [T, H]: drows = weights * grad, dweights = <rows, grad>, both row by row."""
        rows, weights, order, inverse = ctx.saved_tensors
        if _has_kernels(grad, weights, rows):
            of_rows, of_weights = torch.ops.fourfold.spread_gradient(
                grad.contiguous(), rows, weights.contiguous(), inverse, ctx.rows_dtype
            )
            return of_rows, None if rows is None else of_weights, None, None, None
        of_rows = grad.to(ctx.rows_dtype)[order // inverse.shape[1]]
        of_weights = None
        if rows is not None:
            wide = torch.promote_types(weights.dtype, torch.float32)
            of_weights = (rows * of_rows).sum(-1, dtype=wide)[inverse].to(weights.dtype)
        return of_rows.mul_(weights.reshape(-1)[order, None]), of_weights, None, None, None


def _sum(rows: Tensor, inverse: Tensor, weights: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Sum over a token's choices of its rows, weighted if asked: [T K, H], [T, K], [T, K] -> [T, H] of `dtype`.

    In fp32 at least, and never with a tensor of all rows in it: one kernel, or choice after choice, of which a compiler
    makes one pass.
    """
    if _has_kernels(rows, weights):
        given = None if weights is None else weights.contiguous()
        return torch.ops.fourfold.sum_rows(rows.contiguous(), inverse, given, dtype)
    alike = rows.dtype == dtype and (weights is None or weights.dtype == dtype)
    if alike and not torch.compiler.is_compiling():
        return F.embedding_bag(inverse, rows, mode="sum", per_sample_weights=weights)
    wide = torch.promote_types(rows.dtype, torch.float32)
    total = rows.new_zeros(inverse.shape[0], rows.shape[1], dtype=wide)
    for choice in range(inverse.shape[1]):
        part = rows[inverse[:, choice]]
        total = total + part if weights is None else torch.addcmul(total, part, weights[:, choice, None])
    return total.to(dtype)


def _has_kernels(*tensors: Tensor | None) -> bool:
    given = [tensor for tensor in tensors if tensor is not None]
    return given[0].device.type == "cuda" and _HAS_TRITON and all(tensor.itemsize <= 4 for tensor in given)


_OPERATORS = torch.library.Library("fourfold", "FRAGMENT")
_OPERATORS.define("spread(Tensor tokens, Tensor inverse) -> Tensor")
_OPERATORS.define("sum_rows(Tensor rows, Tensor inverse, Tensor? weights, ScalarType dtype) -> Tensor")
_OPERATORS.define(
    "spread_gradient(Tensor grad, Tensor? rows, Tensor weights, Tensor inverse, ScalarType dtype) -> (Tensor, Tensor)"
)


@torch.library.impl(_OPERATORS, "spread", "CUDA")
def _spread_on_cuda(tokens: Tensor, inverse: Tensor) -> Tensor:
    from fourfold.parallel.rows_kernel import spread

    return spread(tokens, inverse)


@torch.library.register_fake("fourfold::spread", lib=_OPERATORS)
def _spread_of_fakes(tokens: Tensor, inverse: Tensor) -> Tensor:
    return tokens.new_empty(inverse.numel(), tokens.shape[1])


@torch.library.impl(_OPERATORS, "sum_rows", "CUDA")
def _sum_on_cuda(rows: Tensor, inverse: Tensor, weights: Tensor | None, dtype: torch.dtype) -> Tensor:
    from fourfold.parallel.rows_kernel import sum_rows

    return sum_rows(rows, inverse, weights, dtype)


@torch.library.register_fake("fourfold::sum_rows", lib=_OPERATORS)
def _sum_of_fakes(rows: Tensor, inverse: Tensor, weights: Tensor | None, dtype: torch.dtype) -> Tensor:
    return rows.new_empty(inverse.shape[0], rows.shape[1], dtype=dtype)


@torch.library.impl(_OPERATORS, "spread_gradient", "CUDA")
def _spread_gradient_on_cuda(
    grad: Tensor, rows: Tensor | None, weights: Tensor, inverse: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    from fourfold.parallel.rows_kernel import spread_gradient

    return spread_gradient(grad, rows, weights, inverse, dtype)


@torch.library.register_fake("fourfold::spread_gradient", lib=_OPERATORS)
def _spread_gradient_of_fakes(
    grad: Tensor, rows: Tensor | None, weights: Tensor, inverse: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    of_weights = torch.empty_like(weights) if rows is not None else weights.new_empty(0)
    return grad.new_empty(inverse.numel(), grad.shape[1], dtype=dtype), of_weights
