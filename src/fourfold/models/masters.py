"""Linear layers of trained weights whose masters are wider than the products: fp32 masters, products in 16 bits.

Autocast copies each master for its product and keeps the copy for the backward pass: two bytes a number of all layers
for as long as their activations live. Here each direction is one operator that copies for itself, and on CUDA the
gradient of an fp32 master is written by the product that makes it, neither rounded to 16 bits nor cast back. In further
micro-batches of a step that product adds to what is there.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourfold.models.trained_linear import TrainedLinear, compute_dtype, exchange

_OPERATORS = torch.library.Library("fourfold", "FRAGMENT")
_OPERATORS.define("wide_product(Tensor x, Tensor weight) -> Tensor")
_OPERATORS.define("wide_product_back(Tensor grad, Tensor x, Tensor weight, bool wants_x) -> (Tensor, Tensor)")

_ADDING: WeakValueDictionary[int, nn.Parameter] = WeakValueDictionary()
"""Masters whose gradients are added to by the products that make them, by where they lie."""


@torch.library.impl(_OPERATORS, "wide_product", "CompositeExplicitAutograd")
def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, in], weight [out, in] -> [T, out] as x."""
    return torch.mm(x, weight.to(x.dtype).t())


@torch.library.register_fake("fourfold::wide_product", lib=_OPERATORS)
def _product_of_fakes(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.impl(_OPERATORS, "wide_product_back", "CompositeExplicitAutograd")
def _product_back(grad: Tensor, x: Tensor, weight: Tensor, wants_x: bool) -> tuple[Tensor, Tensor]:
    """grad [T, out] -> gradients of x, empty if it is not wanted, and of weight in its dtype."""
    grad_x = torch.mm(grad, weight.to(grad.dtype)) if wants_x else grad.new_empty(0)
    return grad_x, _gradient(grad.t(), x, weight)


def _gradient(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """grad [out, T] x [T, in] in the dtype of weight; with what the weight's gradient is so far, where that is taken."""
    sum_ = _taken_gradient(weight)
    if weight.is_cuda and weight.dtype == torch.float32:
        if sum_ is None:
            return torch.mm(grad, x, out_dtype=torch.float32)
        return torch.addmm(sum_, grad, x, out_dtype=torch.float32, out=sum_)
    product = torch.mm(grad, x).to(weight.dtype)
    return product if sum_ is None else sum_.add_(product)


def _taken_gradient(weight: Tensor) -> Tensor | None:
    """A master's gradient of the micro-batches before, taken away from it: autograd puts what it is given in the place
    of no gradient, and adds it to one."""
    master = _ADDING.get(weight.data_ptr())
    if master is None or master.data_ptr() != weight.data_ptr() or master.grad is None:
        return None
    found, master.grad = master.grad, None
    return found


@torch.library.register_fake("fourfold::wide_product_back", lib=_OPERATORS)
def _product_back_of_fakes(grad: Tensor, x: Tensor, weight: Tensor, wants_x: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape) if wants_x else grad.new_empty(0), weight.new_empty(weight.shape)


class _WideProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(x, weight)
        return torch.ops.fourfold.wide_product(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        wants_x = ctx.needs_input_grad[0]
        grad_x, grad_weight = torch.ops.fourfold.wide_product_back(grad, *ctx.saved_tensors, wants_x)
        return grad_x if wants_x else None, grad_weight


class WideLinear(TrainedLinear):
    """A linear layer of a trained weight, under autocast without a copy that is kept."""

    product = _WideProduct.apply

    def forward(self, input: Tensor) -> Tensor:
        """input [..., in] -> [..., out]."""
        if self.weight.dtype == compute_dtype(input) or not torch.is_grad_enabled():
            return F.linear(input, self.weight, self.bias)
        return super().forward(input)


def use_wide_products(blocks: Iterable[nn.Module], compute: torch.dtype) -> int:
    """Let trained linear layers of some blocks copy their masters for themselves, in place: their class is exchanged.

    Args:
        compute: dtype of the products; layers whose weights are in it are left alone.
    Returns:
        how many layers do.
    """
    return exchange(blocks, WideLinear, lambda layer: layer.weight.dtype != compute)


def add_within_products(blocks: Iterable[nn.Module]) -> int:
    """Let layers with wide products add the gradients of a step's micro-batches as they make them.

    `backward` alone does so; who asks autograd for the gradients themselves would get sums. Nothing may listen to them
    (DDP, FSDP).

    Args:
        blocks: on their device; weights that are put elsewhere later are added up by autograd again.
    Returns:
        how many layers do.
    """
    found = [layer.weight for block in blocks for layer in block.modules() if isinstance(layer, WideLinear)]
    _ADDING.update((weight.data_ptr(), weight) for weight in found)
    return len(found)
