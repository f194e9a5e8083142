"""LoRA of stacked experts as low-rank terms of their rows, as it is of plain layers.

PEFT adds the product of an adapter's matrices to the experts' own, in each forward pass and for each adapter anew, and
autograd keeps the sum, as large as the experts, for the backward pass. Here rows go through both thin matrices instead:
nothing of the experts' size is made, and an adapter's small numbers are not rounded to those of the weight.

Shape legend: N rows, E experts, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourfold.base.peft import ParamWrapper
from fourfold.parallel.local_experts import ADAPTERS, takes_rows

_ALIGNED = 8
"""Grouped products take rows of whole 16 bytes."""


def use_row_adapters(model: nn.Module) -> int:
    """Let LoRA of experts that run by `local_experts` be terms of their rows; in place.

    Whatever is not known here stays with PEFT: several adapters at a time, a single expert, packed weights.

    Returns:
        how many adapted parameters do.
    """
    found = [module for module in model.modules() if isinstance(module, ParamWrapper)]
    for wrapper in found:
        wrapper.__class__ = _class_of(type(wrapper))
        setattr(wrapper.get_base_layer(), ADAPTERS, {})
    return len(found)


@lru_cache(maxsize=8)
def _class_of(wrapper: type[ParamWrapper]) -> type[ParamWrapper]:
    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter = None if kwargs.get("adapter_names") else _only_adapter(self)
        if adapter is None:
            return wrapper.forward(self, x, *args, **kwargs)
        with _lent(self.get_base_layer(), self.parameter_name, _term(self, adapter)):
            return self.base_layer(x, *args, **kwargs)

    return type(wrapper.__name__, (wrapper,), {"forward": forward})


def _only_adapter(wrapper: Any) -> str | None:
    """The name of the one adapter that is at work, where rows can go through it."""
    adapters = [name for name in wrapper.active_adapters if name in wrapper.lora_A]
    experts = wrapper.get_base_layer()
    if wrapper.disable_adapters or wrapper.merged or len(adapters) != 1 or wrapper.num_experts == 1:
        return None
    return adapters[0] if takes_rows(experts) and not wrapper.lora_bias[adapters[0]] else None


Multiply = Callable[[Tensor, Tensor], Tensor]
"""rows [N, in], matrices [E, in, out] -> [N, out]."""


def _term(wrapper: Any, adapter: str) -> Callable[[Tensor, Multiply], Tensor]:
    """What an adapter adds to a product: of rows [N, in], [N, out]."""
    count, scaling = wrapper.num_experts, wrapper.scaling[adapter]
    into, out_of = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight

    def term(rows: Tensor, multiply: Multiply) -> Tensor:
        down = into.to(rows.dtype).view(count, -1, into.shape[1])  # [E, r, in]
        up = _ExpertsFirst.apply((scaling * out_of).to(rows.dtype), count, _ALIGNED)
        down = F.pad(down, (0, 0, 0, -down.shape[1] % _ALIGNED))
        return multiply(multiply(rows, down.transpose(1, 2)), up)  # type: ignore[arg-type]

    return term


class _ExpertsFirst(torch.autograd.Function):
    """An outer matrix as PEFT has it, [out, r E], as those of the experts, [E, r, out]; more rows are zeros."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, count: int, multiple: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """[out, r E] -> [E, r, out], with r a multiple of `multiple`."""
        ctx.shape = matrix.shape
        return torch.ops.fourfold.experts_first(matrix, count, multiple)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """grad [E, r, out]."""
        rank = ctx.shape[1] // grad.shape[0]
        return grad[:, :rank].permute(2, 1, 0).reshape(ctx.shape), None, None


_OPERATORS = torch.library.Library("fourfold", "FRAGMENT")
_OPERATORS.define("experts_first(Tensor matrix, int count, int multiple) -> Tensor")


@torch.library.impl(_OPERATORS, "experts_first", "CompositeExplicitAutograd")
def _experts_first(matrix: Tensor, count: int, multiple: int) -> Tensor:
    # an operator, since a compiler lays such a copy as it likes, and grouped products take experts one behind the other
    outer, rank = matrix.shape[0], matrix.shape[1] // count
    found = matrix.new_zeros(count, rank + -rank % multiple, outer)
    found[:, :rank] = matrix.view(outer, rank, count).permute(2, 1, 0)
    return found


@torch.library.register_fake("fourfold::experts_first", lib=_OPERATORS)
def _experts_first_of_fakes(matrix: Tensor, count: int, multiple: int) -> Tensor:
    rank = matrix.shape[1] // count
    return matrix.new_empty(count, rank + -rank % multiple, matrix.shape[0])


@contextmanager
def _lent(experts: nn.Module, parameter: str, term: Callable[..., Tensor]) -> Iterator[None]:
    terms: dict[str, Callable[..., Tensor]] = getattr(experts, ADAPTERS)
    terms[parameter] = term
    try:
        yield
    finally:
        del terms[parameter]
