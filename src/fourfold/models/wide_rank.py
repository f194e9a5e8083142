"""Products with a frozen weight and a low-rank term as one product: y = [x, l] [W, B]^T, for l = s x A^T.

To write the low-rank term first and add the large product to it (models/low_rank.py) is a pass over the result, and
another one within the product. Here neither is, where a compiler has whoever makes x write it into the wider rows; and
so of the gradient of x, [G, l'] [W; A], for l' = s G B. Forward it pays where the result is wider than the input:
queries, keys and values as one, and the two of a gated MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fourfold.base.inductor import beside
from fourfold.families.one_input import columns_of_rank
from fourfold.models.low_rank import FrozenWeight, apart, results, side_by_side

_ALIGNED = 8
"""What a row must be a multiple of, so that kernels may read it sixteen bytes at a time."""

_OPERATORS = torch.library.Library("fourfold", "FRAGMENT")
_OPERATORS.define("wide_rank(Tensor x, Tensor wide, Tensor? bias, Tensor b) -> Tensor")
_OPERATORS.define("wide_rank_back(Tensor grad, Tensor wide, Tensor a, Tensor b, Tensor x) -> (Tensor, Tensor)")


@torch.library.impl(_OPERATORS, "wide_rank", "CompositeExplicitAutograd")
def _product(x: Tensor, wide: Tensor, bias: Tensor | None, b: Tensor) -> Tensor:
    """x [T, in + R], wide [out + R, in + R], whose last columns become b [out, R] -> [T, out]."""
    # Nobody else reads them, and they are the same until the adapters change. Autograd, which keeps the rest for the
    # backward pass, is not told.
    weight = wide.data[: b.shape[0]]
    weight[:, -b.shape[1] :].copy_(b)
    return torch.mm(x, weight.T) if bias is None else torch.addmm(bias, x, weight.T)


@torch.library.register_fake("fourfold::wide_rank", lib=_OPERATORS)
def _product_of_fakes(x: Tensor, wide: Tensor, bias: Tensor | None, b: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], b.shape[0])


@torch.library.impl(_OPERATORS, "wide_rank_back", "CompositeExplicitAutograd")
def _product_back(grad: Tensor, wide: Tensor, a: Tensor, b: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """grad [T, out + R], whose last columns are nobody else's; wide [out + R, in + R], whose last rows become a; a
    [R, in]; b [out, R], scaled; x [T, in] -> the gradients of x, and of a, scaled."""
    (out, _), width = b.shape, a.shape[1]
    low_grad, weight = grad.data[:, out:], wide.data[:, :width]
    torch.mm(grad[:, :out], b, out=low_grad)
    weight[out:].copy_(a)
    return torch.mm(grad, weight), torch.mm(low_grad.T, x)


@torch.library.register_fake("fourfold::wide_rank_back", lib=_OPERATORS)
def _product_back_of_fakes(grad: Tensor, wide: Tensor, a: Tensor, b: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(a)


class _WideRank(torch.autograd.Function):
    """As models/low_rank.py has it, but for the large products."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, wide: Tensor, bias: Tensor | None, scale: float, *adapters: Tensor
    ) -> tuple[Tensor, ...]:
        """See `wide_rank`; adapters: A of each weight, then B of each."""
        a, b = side_by_side(adapters, x.dtype)
        (rank, width), out = a.shape, b.shape[0]
        is_wide = out > width
        if is_wide:
            more = columns_of_rank(rank) - rank
            both = torch.cat([x, x @ F.pad(scale * a, (0, 0, 0, more)).T], 1)
            y = torch.ops.fourfold.wide_rank(both, wide, bias, F.pad(b, (0, more)))
            ctx.save_for_backward(both, wide, *adapters)
        else:
            low = x @ (scale * a).T
            y = torch.ops.fourfold.low_rank(x, *FrozenWeight.plain(wide[:out, :width]), bias, low, b)
            ctx.save_for_backward(x, low, wide, *adapters)
        ctx.scale, ctx.is_wide = scale, is_wide
        return results(y, adapters[len(adapters) // 2 :])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """grads [T, out] each; weight and bias are frozen."""
        if ctx.is_wide:
            both, wide, *adapters = ctx.saved_tensors
            width, rank = adapters[0].shape[1], sum(each.shape[0] for each in adapters[: len(adapters) // 2])
            x, low = both[:, :width], both[:, width : width + rank]
        else:
            x, low, wide, *adapters = ctx.saved_tensors
        a, b = side_by_side(adapters, grads[0].dtype)
        (rank, _), out = a.shape, b.shape[0]
        more = columns_of_rank(rank)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad = beside([*grads, grads[0].new_zeros(grads[0].shape[0], more)])
            of_input, of_output = F.pad(a, (0, 0, 0, more - rank)), F.pad(ctx.scale * b, (0, more - rank))
            grad_x, grad_a = torch.ops.fourfold.wide_rank_back(grad, wide, of_input, of_output, x)
            grad, grad_a = grad[:, :out], grad_a[:rank]
        else:
            grad = beside(grads)
            grad_a = torch.mm((grad @ (ctx.scale * b)).T, x)
        return grad_x, None, None, None, *apart(grad_a, torch.mm(grad.T, low), adapters)


def wide_rank(
    x: Tensor, wide: Tensor, bias: Tensor | None, a: Sequence[Tensor], b: Sequence[Tensor], scale: float
) -> tuple[Tensor, ...]:
    """The product of x with a frozen weight and its low-rank terms; see `low_rank`.

    Args:
        x: [T, in] in the dtype of the product, as the weight and the bias.
        wide: as `widened` makes it; its last rows and columns are written over.
    Returns:
        [T, its out] of each.
    """
    return _WideRank.apply(x, wide, bias, scale, *a, *b)  # type: ignore[return-value]


def takes(weight: Tensor) -> bool:
    """Whether rows would be where kernels want them; of a weight [out, in]."""
    return all(size % _ALIGNED == 0 for size in weight.shape)


def has_room(wide: Tensor, a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Whether a weight was widened for such adapters, [r, in] and [its out, r] of each weight that it is joined of."""
    more = columns_of_rank(sum(each.shape[0] for each in a))
    return wide.shape == (sum(each.shape[0] for each in b) + more, a[0].shape[1] + more)


def widened(weight: Tensor, rank: int) -> Tensor:
    """A weight [out, in] with room for terms of a rank: [out + R, in + R], the last R rows and columns zero."""
    import torch._dynamo  # takes a second, and is there where layers are compiled

    more = columns_of_rank(rank)
    found = F.pad(weight, (0, more, 0, more))
    torch._dynamo.mark_static(found)  # its sizes are nobody's number of tokens
    return found
