"""Linear layers of trained weights whose masters are wider than the products: fp32 masters, products in 16 bits.

Autocast copies each master for its product and keeps the copy for the backward pass: two bytes a number of all layers
for as long as their activations live. Here each direction is one operator that copies for itself, and on CUDA the
gradient of an fp32 master is written by the product that makes it, neither rounded to 16 bits nor cast back. In further
micro-batches of a step that product adds to what is there. Layers of one input are one product.

Where there is room, the copies are kept from update to update instead (`keep_copies`), and the optimizer writes them
with the masters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from fourfold.base.inductor import beside
from fourfold.models.trained_linear import TrainedLinear, compute_dtype, exchange

_OPERATORS = torch.library.Library("fourfold", "FRAGMENT")
_OPERATORS.define("wide_product(Tensor x, Tensor[] weights) -> Tensor")
_OPERATORS.define("wide_product_back(Tensor grad, Tensor x, Tensor[] weights, bool wants_x) -> (Tensor, Tensor)")

_ADDING: WeakValueDictionary[int, Tensor] = WeakValueDictionary()
"""Masters whose gradients are added to by the products that make them, by where they lie."""
_COPIES: WeakValueDictionary[int, Copies] = WeakValueDictionary()
"""Copies of masters that are kept, by where each master lies."""


class Copies:
    """Copies of masters in the compute dtype, one below the other, for as long as somebody holds on to this.

    A copy is made again where its master has been written since: by an optimizer, unless that writes the copy as well
    (`copy_of`), or by what torch counts. It does not count its fused optimizers, kernels of others, and what is written
    to `.data`: outside an optimizer's step masters are not to be written so.

    Args:
        masters: [out, in] each, contiguous.
    """

    def __init__(self, masters: Sequence[Tensor], dtype: torch.dtype) -> None:
        self._masters = list(masters)
        rows = [master.shape[0] for master in masters]
        self._whole = masters[0].new_empty(sum(rows), masters[0].shape[1], dtype=dtype)
        self._parts = self._whole.split(rows)
        self._versions: list[int | None] = [None] * len(rows)
        self._written: set[int] = set()
        _COPIES.update({master.data_ptr(): self for master in masters})

    @property
    def nbytes(self) -> int:
        """What they take."""
        return self._whole.nbytes

    @torch.no_grad()
    def of(self, weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor | None:
        """The copies of just these weights [sum of out, in], as the masters are now; None if they are others."""
        places = [weight.data_ptr() for weight in weights]
        if self._whole.dtype != dtype or places != [master.data_ptr() for master in self._masters]:
            return None
        for number, (master, part) in enumerate(zip(self._masters, self._parts, strict=True)):
            if self._versions[number] != master._version:
                part.copy_(master)
                self._versions[number] = master._version
        return self._whole

    def to_write(self, master: Tensor) -> Tensor | None:
        """The copy of one master, if it is what the master is now; whoever asks writes it with the master."""
        for number, own in enumerate(self._masters):
            if own is master and self._versions[number] == own._version:
                self._written.add(number)
                return self._parts[number]
        return None

    def settle(self) -> None:
        """An optimizer has changed the masters, and the copies that it asked for."""
        self._versions = [version if n in self._written else None for n, version in enumerate(self._versions)]
        self._written.clear()


def _settle(*_: object) -> None:
    for copies in set(_COPIES.values()):
        copies.settle()


@lru_cache(maxsize=1)
def _watch_optimizers() -> None:
    """Have copies made again after the step of any optimizer that did not write them."""
    register_optimizer_step_post_hook(_settle)


def copy_of(master: Tensor) -> Tensor | None:
    """The copy of a master, contiguous and of its shape, that an optimizer writes in the same step; None if there is
    none, or none that is what the master is now."""
    found = _COPIES.get(master.data_ptr())
    return None if found is None else found.to_write(master)


def _narrow(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Weights one below the other in a dtype, copied if no copies are kept."""
    kept = _COPIES.get(weights[0].data_ptr())
    found = None if kept is None else kept.of(weights, dtype)
    if found is not None:
        return found
    if len(weights) == 1:
        return weights[0].to(dtype)
    rows = [weight.shape[0] for weight in weights]
    whole = weights[0].new_empty(sum(rows), weights[0].shape[1], dtype=dtype)
    for weight, part in zip(weights, whole.split(rows), strict=True):
        part.copy_(weight)
    return whole


@torch.library.impl(_OPERATORS, "wide_product", "CompositeExplicitAutograd")
def _product(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """x [T, in], weights [out, in] each -> [T, sum of out] as x."""
    return torch.mm(x, _narrow(weights, x.dtype).t())


@torch.library.register_fake("fourfold::wide_product", lib=_OPERATORS)
def _product_of_fakes(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    return x.new_empty(x.shape[0], sum(weight.shape[0] for weight in weights))


@torch.library.impl(_OPERATORS, "wide_product_back", "CompositeExplicitAutograd")
def _product_back(grad: Tensor, x: Tensor, weights: Sequence[Tensor], wants_x: bool) -> tuple[Tensor, Tensor]:
    """grad [T, sum of out] -> gradients of x, empty if it is not wanted, and of the weights in their dtype, one below
    the other."""
    grad_x = torch.mm(grad, _narrow(weights, grad.dtype)) if wants_x else grad.new_empty(0)
    return grad_x, _gradient(grad.t(), x, weights)


@torch.library.register_fake("fourfold::wide_product_back", lib=_OPERATORS)
def _product_back_of_fakes(grad: Tensor, x: Tensor, weights: Sequence[Tensor], wants_x: bool) -> tuple[Tensor, Tensor]:
    of_weights = weights[0].new_empty(sum(weight.shape[0] for weight in weights), weights[0].shape[1])
    return x.new_empty(x.shape) if wants_x else grad.new_empty(0), of_weights


def _gradient(grad: Tensor, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """grad [sum of out, T] x [T, in] in the dtype of the weights, and their gradients so far, where those are taken."""
    sum_ = _taken_gradients(weights)
    if weights[0].is_cuda and weights[0].dtype == torch.float32:
        if sum_ is None:
            return torch.mm(grad, x, out_dtype=torch.float32)
        return torch.addmm(sum_, grad, x, out_dtype=torch.float32, out=sum_)
    product = torch.mm(grad, x).to(weights[0].dtype)
    return product if sum_ is None else sum_.add_(product)


def _taken_gradients(weights: Sequence[Tensor]) -> Tensor | None:
    """Masters' gradients of the micro-batches before, taken away from them: autograd puts what it is given in the place
    of no gradient, and adds it to one. None unless all are there, one below the other."""
    masters = [_ADDING.get(weight.data_ptr()) for weight in weights]
    found: list[Tensor] = []
    for weight, master in zip(weights, masters, strict=True):
        if master is None or master.data_ptr() != weight.data_ptr() or master.grad is None:
            return None
        if not master.grad.is_contiguous() or (found and not _comes_after(found[-1], master.grad)):
            return None
        found.append(master.grad)
    whole = found[0].as_strided((sum(weight.shape[0] for weight in weights), found[0].shape[1]), found[0].stride())
    for master in masters:
        assert master is not None
        master.grad = None
    return whole


def _comes_after(one: Tensor, other: Tensor) -> bool:
    """Whether a contiguous tensor begins where another one ends, in the same memory."""
    of_one = one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    return of_one and other.data_ptr() == one.data_ptr() + one.nbytes and one.dtype == other.dtype


class _WideProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(x, *weights)
        out = torch.ops.fourfold.wide_product(x, weights)
        # one result as it is: of several, each a view, none may be written in place
        return (out,) if len(weights) == 1 else out.split([weight.shape[0] for weight in weights], 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        wants_x = ctx.needs_input_grad[0]
        x, *weights = ctx.saved_tensors
        grad_x, grad_weights = torch.ops.fourfold.wide_product_back(beside(grads), x, weights, wants_x)
        parts = grad_weights.split([weight.shape[0] for weight in weights])
        return grad_x if wants_x else None, *parts


def _products(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """x [..., in], weights [out, in] each -> [..., out] each."""
    parts: Any = _WideProduct.apply(x.reshape(-1, x.shape[-1]), *weights)
    return tuple(part.view(*x.shape[:-1], part.shape[-1]) for part in parts)


class WideLinear(TrainedLinear):
    """A linear layer of a trained weight, under autocast without a copy that autograd keeps.

    Attributes:
        copies: of its weight and its siblings' where they are kept; the first of them has them.
    """

    product = _products
    copies: Copies | None = None

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


def _groups(blocks: Iterable[nn.Module]) -> Iterator[list[TrainedLinear]]:
    """The layers of each wide product."""
    seen: set[TrainedLinear] = set()
    for block in blocks:
        for layer in block.modules():
            if isinstance(layer, WideLinear) and layer not in seen:
                found: list[TrainedLinear] = [layer]
                if layer.siblings is not None:
                    found = list(layer.siblings[1].layers.values())
                seen.update(found)
                yield found


def add_within_products(blocks: Iterable[nn.Module]) -> int:
    """Let layers with wide products add the gradients of a step's micro-batches as they make them.

    `backward` alone does so; who asks autograd for the gradients themselves would get sums. Nothing may listen to them
    (DDP, FSDP).

    Args:
        blocks: on their device; weights that are put elsewhere later are added up by autograd again.
    Returns:
        how many layers do.
    """
    masters: list[Tensor] = [layer.weight for group in _groups(blocks) for layer in group]
    _ADDING.update({master.data_ptr(): master for master in masters})
    return len(masters)


def keep_copies(blocks: Iterable[nn.Module], compute: torch.dtype) -> int:
    """Keep copies of masters in the dtype of the products, from update to update.

    An optimizer that writes `copy_of` a master as well spares a pass over both; after any other they are made again.

    Args:
        blocks: on their device, not to be put elsewhere; they hold the copies.
    Returns:
        bytes of the copies.
    """
    _watch_optimizers()
    count = 0
    for group in _groups(blocks):
        copies = Copies([layer.weight for layer in group], compute)
        first = group[0]
        assert isinstance(first, WideLinear)
        first.copies = copies
        count += copies.nbytes
    return count
