"""Operators that tell Inductor how to write what others read; elsewhere they are what PyTorch has for it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fourfold.base.triton import has_triton

_OPERATORS = torch.library.Library("fourfold", "FRAGMENT")
_OPERATORS.define("beside(Tensor[] parts) -> Tensor")
_OPERATORS.define("written_once(Tensor values) -> Tensor")
_OPERATORS.define("topk_of_few(Tensor numbers, int k) -> (Tensor, Tensor)")
_FEW, _MOST_CHOSEN = 512, 16
"""Of how many numbers, and how many, the largest are found by a kernel of our own."""
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@torch.library.impl(_OPERATORS, "beside", "CompositeExplicitAutograd")
def _beside(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts), 1)


@torch.library.register_fake("fourfold::beside", lib=_OPERATORS)
def _beside_of_fakes(parts: Sequence[Tensor]) -> Tensor:
    return parts[0].new_empty(parts[0].shape[0], sum(part.shape[1] for part in parts))


def beside(parts: Sequence[Tensor]) -> Tensor:
    """Parts [T, n] each, of one dtype, put side by side -> [T, sum of n]; one part as it is. Not differentiable.

    Inductor makes one kernel of a `cat` whose parts are computed, and computes every part for every number of the
    result: the gradients of a gated MLP's two layers took 1.4 times as long to write as each by itself (H100). Told
    otherwise, it lets each part be written where it belongs.
    """
    return parts[0] if len(parts) == 1 else torch.ops.fourfold.beside(parts)


@torch.library.impl(_OPERATORS, "written_once", "CompositeExplicitAutograd")
def _written_once(values: Tensor) -> Tensor:
    return values.clone()


@torch.library.register_fake("fourfold::written_once", lib=_OPERATORS)
def _written_once_of_fakes(values: Tensor) -> Tensor:
    return torch.empty_like(values)


def written_once(values: Tensor) -> Tensor:
    """Values that kernels of our own are to read, as they are. Not differentiable.

    Inductor writes what it computes for such a kernel anew for each of the kernel's arguments and each kernel, since
    their strides are given: the input of a product in float8 was written six times (H100). Told to, it writes it, and
    hands that on. To be used where strides are those of contiguous values.
    """
    return torch.ops.fourfold.written_once(values) if torch.compiler.is_compiling() else values


@torch.library.impl(_OPERATORS, "topk_of_few", "CUDA")
def _topk_of_few(numbers: Tensor, k: int) -> tuple[Tensor, Tensor]:
    from fourfold.base.topk_kernel import topk

    return topk(numbers, k)


@torch.library.register_fake("fourfold::topk_of_few", lib=_OPERATORS)
def _topk_of_fakes(numbers: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values = numbers.new_empty(*numbers.shape[:-1], k)
    return values, torch.empty_like(values, dtype=torch.long)


def _are_few(numbers: Any, k: int, dim: int) -> bool:
    """Whether the kernel of our own is for what Inductor is to find the largest of; not where sizes are unknown."""
    import sympy

    size = numbers.get_size()
    plain = numbers.get_device().type == "cuda" and numbers.get_dtype() in _FLOATS and dim in (-1, len(size) - 1)
    width = size[-1] if size else 0
    known = all(isinstance(each, int | sympy.Integer) for each in (width, k))
    return plain and known and k <= _MOST_CHOSEN and k <= width <= _FEW


@lru_cache(maxsize=1)
def teach_inductor() -> None:
    """Let Inductor know these operators, and that `topk` of few numbers is one. To be called before anything is
    compiled."""
    from torch._inductor import ir, lowering

    register: Any = lowering.register_lowering
    topk: Any = torch.ops.aten.topk.default
    usual, own = lowering.lowerings[topk], lowering.fallback_handler(torch.ops.fourfold.topk_of_few.default)

    @register(topk, type_promotion_kind=None)
    def _lower_topk(numbers: Any, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
        if largest and has_triton() and _are_few(numbers, k, dim):
            return own(numbers, int(k))
        return usual(numbers, k, dim, largest, sorted)

    @register(torch.ops.fourfold.beside.default, type_promotion_kind=None)
    def _lower_beside(parts: list[Any]) -> Any:
        return ir.TensorBox(ir.ConcatKernel.create(parts, 1))  # pyright: ignore[reportArgumentType, reportCallIssue]

    @register(torch.ops.fourfold.written_once.default, type_promotion_kind=None)
    def _lower_written_once(values: Any) -> Any:
        values.realize()
        return values
