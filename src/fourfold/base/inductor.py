"""Operators that tell Inductor how to write what others read; elsewhere they are what PyTorch has for it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

_OPERATORS = torch.library.Library("fourfold", "FRAGMENT")
_OPERATORS.define("beside(Tensor[] parts) -> Tensor")
_OPERATORS.define("written_once(Tensor values) -> Tensor")


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


@lru_cache(maxsize=1)
def teach_inductor() -> None:
    """Let Inductor know these operators. To be called before anything is compiled."""
    from torch._inductor import ir, lowering

    register: Any = lowering.register_lowering

    @register(torch.ops.fourfold.beside.default, type_promotion_kind=None)
    def _lower_beside(parts: list[Any]) -> Any:
        return ir.TensorBox(ir.ConcatKernel.create(parts, 1))  # pyright: ignore[reportArgumentType, reportCallIssue]

    @register(torch.ops.fourfold.written_once.default, type_promotion_kind=None)
    def _lower_written_once(values: Any) -> Any:
        values.realize()
        return values
