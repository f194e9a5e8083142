"""Products with a frozen weight and a low-rank term, differentiable: y = x W^T + s (x A^T) B^T.

Each direction is one operator, so that what keeps the results of products (parallel/recompute.py) sees y when it is
whole, a compiler does not copy what is added to in place, and a weight that is unpacked for its use is nobody's to
keep.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fourfold.base.inductor import beside
from fourfold.parallel.mesh import is_ampere_or_later
from fourfold.parallel.packed import state_of

_MOST_JOINED = 2**26
"""Numbers that are unpacked together at most, if they are more than one weight: 128 MiB in 16 bits."""

_PLAIN_SCALES, _PACKED_SCALES = 3, 6
"""Tensors of a packed weight whose scales are plain, and whose scales are packed themselves."""


class FrozenWeight(NamedTuple):
    """A weight [out, in] without a gradient, in tensors and plain values that an operator can be given.

    Attributes:
        tensors: the weight itself; or, of each packed weight that it is joined of, two columns a byte in whatever
            dtype they are stored, its scales: one a block, fp32; or, where these are packed themselves, as codes
            [uint8] with what unpacks them: their scales, the table of codes and what is added; and last the table of
            the weight's own codes.
        sizes: of each packed weight rows, columns, columns of a block, and scales of a block of scales (0 where they
            are plain); empty for a plain weight.
        kind: plain, nf4 or fp4.
        dtype: of the weight before it was packed.
    """

    tensors: list[Tensor]
    sizes: list[int]
    kind: str
    dtype: torch.dtype

    @classmethod
    def plain(cls, weight: Tensor) -> FrozenWeight:
        """A weight as it is."""
        return cls([weight], [], "plain", weight.dtype)

    @classmethod
    def packed(cls, layers: Sequence[nn.Module]) -> FrozenWeight:
        """The weights of bitsandbytes' Linear4bit layers of one input, one below the other."""
        tensors: list[Tensor] = []
        sizes: list[int] = []
        for layer in layers:
            weight: Any = layer.weight
            state = state_of(layer)
            tensors += [weight.data, state.absmax]
            if state.nested:
                tensors += [state.state2.absmax, state.state2.code, state.offset]
            tensors.append(state.code)
            sizes += [*state.shape, state.blocksize, state.state2.blocksize if state.nested else 0]
        first = state_of(layers[0])
        return cls(tensors, sizes, first.quant_type, first.dtype)


def unpacked(weight: FrozenWeight, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The weight in `dtype` with the rows that it is, whole if it is plain or not large."""
    if weight.kind == "plain":
        yield slice(None), weight.tensors[0]
        return
    parts = list(_parts(weight))
    first, start = 0, 0
    while first < len(parts):
        last, rows = first, 0
        while last < len(parts):
            more = rows + parts[last].sizes[0]
            if rows and more * parts[last].sizes[1] > _MOST_JOINED:
                break
            last, rows = last + 1, more
        yield slice(start, start + rows), _joined(parts[first:last], rows, dtype)
        first, start = last, start + rows


def whole(weight: FrozenWeight, dtype: torch.dtype) -> Tensor:
    """All of a packed weight in `dtype`."""
    parts = list(_parts(weight))
    return _joined(parts, sum(part.sizes[0] for part in parts), dtype)


def _parts(weight: FrozenWeight) -> Iterator[FrozenWeight]:
    start = 0
    for at in range(0, len(weight.sizes), 4):
        sizes = weight.sizes[at : at + 4]
        end = start + (_PACKED_SCALES if sizes[3] else _PLAIN_SCALES)
        yield FrozenWeight(weight.tensors[start:end], sizes, weight.kind, weight.dtype)
        start = end


def _joined(parts: Sequence[FrozenWeight], rows: int, dtype: torch.dtype) -> Tensor:
    if len(parts) == 1 and not _has_kernel(parts[0]):
        return _unpacked_by_library(parts[0]).to(dtype)
    data = parts[0].tensors[0]
    out = torch.empty(rows, parts[0].sizes[1], dtype=parts[0].dtype, device=data.device)
    start = 0
    for part in parts:
        _unpack(part, out[start : start + part.sizes[0]])
        start += part.sizes[0]
    return out.to(dtype)


def _unpack(packed: FrozenWeight, out: Tensor) -> None:
    """Write one packed weight to out [rows, columns], in the dtype it had."""
    if _has_kernel(packed):
        from fourfold.parallel.unpack_kernel import unpack_nf4

        unpack_nf4(packed.tensors, packed.sizes, out)
    else:
        out.copy_(_unpacked_by_library(packed))


def _has_kernel(packed: FrozenWeight) -> bool:
    """Whether the kernel of our own takes a packed weight where it lies."""
    rows, columns, block, _ = packed.sizes
    data = packed.tensors[0]
    in_one = packed.kind == "nf4" and rows * columns % block == 0
    return in_one and data.is_cuda and is_ampere_or_later(data.device.index)


def _unpacked_by_library(packed: FrozenWeight) -> Tensor:
    """One packed weight [rows, columns] by bitsandbytes, in the dtype it had."""
    rows, columns, block, second = packed.sizes
    data, absmax, *others, _ = packed.tensors
    if second:
        scales, table, offset = others
        absmax = torch.ops.bitsandbytes.dequantize_blockwise(absmax, scales, table, second, torch.float32) + offset
    return torch.ops.bitsandbytes.dequantize_4bit(data, absmax, block, packed.kind, [rows, columns], packed.dtype)


_OPERATORS = torch.library.Library("fourfold", "DEF")
_WEIGHT = "Tensor[] tensors, int[] sizes, str kind, ScalarType dtype"
_OPERATORS.define(f"low_rank(Tensor x, {_WEIGHT}, Tensor? bias, Tensor low, Tensor b) -> Tensor")
_OPERATORS.define(f"low_rank_back(Tensor grad, {_WEIGHT}, Tensor? low_grad, Tensor? a) -> Tensor")


@torch.library.impl(_OPERATORS, "low_rank", "CompositeExplicitAutograd")
def _low_rank(
    x: Tensor,
    tensors: list[Tensor],
    sizes: list[int],
    kind: str,
    dtype: torch.dtype,
    bias: Tensor | None,
    low: Tensor,
    b: Tensor,
) -> Tensor:
    """y [T, out] for x [T, in], the thin l = s x A^T [T, r], and what is in their dtype.

    The low-rank term is written first and the large product added to it, which hides in that product. The thin one is
    not made here, since a layer that is computed again needs it of its last product, and y not.
    """
    out = x.new_empty(x.shape[0], b.shape[0])
    if bias is None:
        torch.mm(low, b.T, out=out)
    else:
        torch.addmm(bias, low, b.T, out=out)
    for rows, weight in unpacked(FrozenWeight(tensors, sizes, kind, dtype), x.dtype):
        out[:, rows].addmm_(x, weight.T)
    return out


@torch.library.impl(_OPERATORS, "low_rank_back", "CompositeExplicitAutograd")
def _low_rank_back(
    grad: Tensor,
    tensors: list[Tensor],
    sizes: list[int],
    kind: str,
    dtype: torch.dtype,
    low_grad: Tensor | None,
    a: Tensor | None,
) -> Tensor:
    """dL/dx = G W + l' A [T, in], for G = dL/dy [T, out] and l' = s G B [T, r]; G W where there is no l'."""
    out = None if low_grad is None or a is None else torch.mm(low_grad, a)
    for rows, weight in unpacked(FrozenWeight(tensors, sizes, kind, dtype), grad.dtype):
        out = torch.mm(grad[:, rows], weight) if out is None else out.addmm_(grad[:, rows], weight)
    assert out is not None
    return out


class _LowRank(torch.autograd.Function):
    """The product of one input with one weight, or with several that lie one below the other, each with an adapter.

    Only x and the thin l = s x A^T are kept. With G = dL/dy and l' = s G B:
    dL/dx = G W + l' A;  dL/dA = l'^T x;  dL/dB = G^T l. So the scale meets the small matrices alone.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, weight: FrozenWeight, bias: Tensor | None, scale: float, *adapters: Tensor
    ) -> tuple[Tensor, ...]:
        """See `low_rank`; adapters: A of each weight, then B of each."""
        a, b = side_by_side(adapters, x.dtype)
        low = x @ (scale * a).T
        y = torch.ops.fourfold.low_rank(x, *weight, bias, low, b)
        ctx.save_for_backward(x, low, *adapters, *weight.tensors)
        ctx.num_adapters, ctx.scale = len(adapters), scale
        ctx.sizes, ctx.kind, ctx.dtype = weight.sizes, weight.kind, weight.dtype
        return results(y, adapters[len(adapters) // 2 :])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """grads [T, out] each; weight and bias are frozen."""
        grad = beside(grads)
        x, low, *rest = ctx.saved_tensors
        adapters, tensors = rest[: ctx.num_adapters], rest[ctx.num_adapters :]
        a, b = side_by_side(adapters, grad.dtype)
        low_grad = grad @ (ctx.scale * b)
        grad_x = None
        if ctx.needs_input_grad[0]:
            weight = FrozenWeight(tensors, ctx.sizes, ctx.kind, ctx.dtype)
            grad_x = torch.ops.fourfold.low_rank_back(grad, *weight, low_grad, a)
        grad_a, grad_b = torch.mm(low_grad.T, x), torch.mm(grad.T, low)
        return grad_x, None, None, None, *apart(grad_a, grad_b, adapters)


class _WithLow(torch.autograd.Function):
    """The same, given l = s x' A^T, whose x' need not be x.

    dL/dx = G W;  dL/dl = G B;  dL/dB = G^T l.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, weight: FrozenWeight, bias: Tensor | None, low: Tensor, *b: Tensor
    ) -> tuple[Tensor, ...]:
        """low [T, sum of r]; B of each weight."""
        ctx.save_for_backward(low, *b, *weight.tensors)
        ctx.num_adapters, ctx.sizes, ctx.kind, ctx.dtype = len(b), weight.sizes, weight.kind, weight.dtype
        y = torch.ops.fourfold.low_rank(x, *weight, bias, low, _diagonal(b, x.dtype))
        return results(y, b)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """grads [T, out] each; weight and bias are frozen."""
        grad = beside(grads)
        low, *rest = ctx.saved_tensors
        adapters, tensors = rest[: ctx.num_adapters], rest[ctx.num_adapters :]
        grad_x = None
        if ctx.needs_input_grad[0]:
            weight = FrozenWeight(tensors, ctx.sizes, ctx.kind, ctx.dtype)
            grad_x = torch.ops.fourfold.low_rank_back(grad, *weight, None, None)
        low_grad = grad @ _diagonal(adapters, grad.dtype)
        return grad_x, None, None, low_grad, *_of_diagonal(torch.mm(grad.T, low), adapters)


def side_by_side(adapters: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A [sum of r, in], and B [sum of out, sum of r], which is 0 where a row and a column are of different weights."""
    half = len(adapters) // 2
    of_input = adapters[0] if half == 1 else torch.cat(list(adapters[:half]))
    return of_input.to(dtype), _diagonal(adapters[half:], dtype)


def _diagonal(b: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return (b[0] if len(b) == 1 else torch.block_diag(*b)).to(dtype)


def results(y: Tensor, b: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """y [T, sum of out] of each weight, of which b are the outer matrices."""
    return (y,) if len(b) == 1 else y.split([each.shape[0] for each in b], 1)


def apart(grad_a: Tensor, grad_b: Tensor, adapters: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of each A, then of each B."""
    half = len(adapters) // 2
    of_inputs = grad_a.split([a.shape[0] for a in adapters[:half]])
    found = [part.to(each.dtype) for part, each in zip(of_inputs, adapters[:half], strict=True)]
    return found + _of_diagonal(grad_b, adapters[half:])


def _of_diagonal(grad: Tensor, b: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of each B, of that of all."""
    parts: list[Tensor] = []
    row = column = 0
    for each in b:
        parts.append(grad[row : row + each.shape[0], column : column + each.shape[1]].to(each.dtype))
        row, column = row + each.shape[0], column + each.shape[1]
    return parts


def low_rank(
    x: Tensor, weight: FrozenWeight, bias: Tensor | None, a: Sequence[Tensor], b: Sequence[Tensor], scale: float
) -> tuple[Tensor, ...]:
    """The product of x with a frozen weight and its low-rank terms.

    Args:
        x: [T, in] in the dtype of the product, which a plain weight and the bias [out] have as well.
        weight: [out, in], or several of one input, one below the other.
        a, b: the adapters of each of them, [r, in] and [its out, r], in any dtype.
    Returns:
        [T, its out] of each.
    """
    if not torch.is_grad_enabled():  # where a compiler would forget the adapters of a function with a gradient
        of_input, of_output = side_by_side([*a, *b], x.dtype)
        y = torch.ops.fourfold.low_rank(x, *weight, bias, x @ (scale * of_input).T, of_output)
        return results(y, b)
    return _LowRank.apply(x, weight, bias, scale, *a, *b)  # type: ignore[return-value]


def with_low(
    x: Tensor, weight: FrozenWeight, bias: Tensor | None, low: Sequence[Tensor], b: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The product of x with a frozen weight, and low-rank terms of other inputs than x, as dropout makes them.

    Args:
        x, weight, bias, b: as in `low_rank`.
        low: [T, r] of each of them in x's dtype: the input of its adapter times A^T and the scale.
    Returns:
        [T, its out] of each.
    """
    together = low[0] if len(low) == 1 else torch.cat(list(low), 1)
    if not torch.is_grad_enabled():
        return results(torch.ops.fourfold.low_rank(x, *weight, bias, together, _diagonal(b, x.dtype)), b)
    return _WithLow.apply(x, weight, bias, together, *b)  # type: ignore[return-value]
