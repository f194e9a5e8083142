"""Products with a frozen weight and a low-rank term as one product: y = [x, l] [W, B]^T, for l = s x A^T.

To write the low-rank term first and add the large product to it (models/low_rank.py) is a pass over the result, and
another one within the product. Here neither is, where a compiler has whoever makes x write it into the wider rows. It
pays where the result is wider than the input: queries, keys and values as one, and the two of a gated MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fourfold.families.one_input import columns_of_rank
from fourfold.models.inductor import beside
from fourfold.models.low_rank import FrozenWeight, apart, results, side_by_side

_ALIGNED = 8
"""What a row must be a multiple of, so that kernels may read it sixteen bytes at a time."""

_OPERATORS = torch.library.Library("fourfold", "FRAGMENT")
_OPERATORS.define("wide_rank(Tensor x, Tensor wide, Tensor? bias, Tensor b) -> Tensor")


@torch.library.impl(_OPERATORS, "wide_rank", "CompositeExplicitAutograd")
def _product(x: Tensor, wide: Tensor, bias: Tensor | None, b: Tensor) -> Tensor:
    """x [T, in + R], wide [out, in + R], whose last columns become b [out, R] -> [T, out]."""
    # Nobody else reads them, and they are the same until the adapters change. Autograd, which keeps the rest for the
    # backward pass, is not told.
    wide.data[:, -b.shape[1] :].copy_(b)
    return torch.mm(x, wide.T) if bias is None else torch.addmm(bias, x, wide.T)


@torch.library.register_fake("fourfold::wide_rank", lib=_OPERATORS)
def _product_of_fakes(x: Tensor, wide: Tensor, bias: Tensor | None, b: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], wide.shape[0])


class _WideRank(torch.autograd.Function):
    """As models/low_rank.py has it, but for the product of the forward pass."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, wide: Tensor, bias: Tensor | None, scale: float, *adapters: Tensor
    ) -> tuple[Tensor, ...]:
        """See `wide_rank`; adapters: A of each weight, then B of each."""
        a, b = side_by_side(adapters, x.dtype)
        more = columns_of_rank(a.shape[0]) - a.shape[0]
        low = x @ F.pad(scale * a, (0, 0, 0, more)).T
        both = torch.cat([x, low], 1)
        y = torch.ops.fourfold.wide_rank(both, wide, bias, F.pad(b, (0, more)))
        ctx.save_for_backward(both, wide, *adapters)
        ctx.scale = scale
        return results(y, adapters)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """grads [T, out] each; weight and bias are frozen."""
        grad = beside(grads)
        both, wide, *adapters = ctx.saved_tensors
        a, b = side_by_side(adapters, grad.dtype)
        rank, width = a.shape
        x, low = both[:, :width], both[:, width : width + rank]
        low_grad = grad @ (ctx.scale * b)
        grad_x = None
        if ctx.needs_input_grad[0]:
            weight = FrozenWeight.plain(wide[:, :width])
            grad_x = torch.ops.fourfold.low_rank_back(grad, *weight, low_grad, a)
        return grad_x, None, None, None, *apart(torch.mm(low_grad.T, x), torch.mm(grad.T, low), adapters)


def wide_rank(
    x: Tensor, wide: Tensor, bias: Tensor | None, a: Sequence[Tensor], b: Sequence[Tensor], scale: float
) -> tuple[Tensor, ...]:
    """The product of x with a frozen weight and its low-rank terms; see `low_rank`.

    Args:
        x: [T, in] in the dtype of the product, as the weight and the bias.
        wide: as `widened` makes it; its last columns are written over.
    Returns:
        [T, its out] of each.
    """
    return _WideRank.apply(x, wide, bias, scale, *a, *b)  # type: ignore[return-value]


def pays(weight: Tensor) -> bool:
    """Whether one product is faster than two; of a weight [out, in]."""
    out, width = weight.shape
    return out > width and width % _ALIGNED == 0


def has_room(wide: Tensor, width: int, rank: int) -> bool:
    """Whether a weight [out, in + R] whose own width is `in` was widened for such a rank."""
    return wide.shape[1] == width + columns_of_rank(rank)


def widened(weight: Tensor, rank: int) -> Tensor:
    """A weight [out, in] with room for terms of a rank beside it: [out, in + R], the last R columns zero."""
    import torch._dynamo  # takes a second, and is there where layers are compiled

    found = F.pad(weight, (0, columns_of_rank(rank)))
    torch._dynamo.mark_static(found)  # its width is nobody's number of tokens
    return found
