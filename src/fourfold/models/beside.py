"""Tensors put side by side, [T, a] and [T, b] -> [T, a + b], by whoever makes them.

Inductor makes one kernel of a `cat` whose parts are computed, and computes every part for every number of the result:
the gradients of a gated MLP's two layers took 1.4 times as long to write as each by itself (H100). Told otherwise, it
lets each part be written where it belongs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

_OPERATORS = torch.library.Library("fourfold", "FRAGMENT")
_OPERATORS.define("beside(Tensor[] parts) -> Tensor")


@torch.library.impl(_OPERATORS, "beside", "CompositeExplicitAutograd")
def _beside(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts), 1)


@torch.library.register_fake("fourfold::beside", lib=_OPERATORS)
def _beside_of_fakes(parts: Sequence[Tensor]) -> Tensor:
    return parts[0].new_empty(parts[0].shape[0], sum(part.shape[1] for part in parts))


def beside(parts: Sequence[Tensor]) -> Tensor:
    """Parts [T, n] each, of one dtype -> [T, sum of n]; one part as it is. Not differentiable."""
    return parts[0] if len(parts) == 1 else torch.ops.fourfold.beside(parts)


@lru_cache(maxsize=1)
def teach_inductor() -> None:
    """Let Inductor have each part written where it belongs. To be called before anything is compiled."""
    from torch._inductor import ir, lowering

    register: Any = lowering.register_lowering

    @register(torch.ops.fourfold.beside.default, type_promotion_kind=None)
    def _lower(parts: list[Any]) -> Any:
        return ir.TensorBox(ir.ConcatKernel.create(parts, 1))  # pyright: ignore[reportArgumentType, reportCallIssue]
