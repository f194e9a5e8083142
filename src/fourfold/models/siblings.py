"""Layers of one module that are called with the same tensor: one product, made when the first of them is called.

Each stays a layer of its own to everybody else: names, parameters, hooks and saving are as they were.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Generic, TypeVar

from torch import Tensor, nn

from fourfold.families.one_input import OF_ONE_INPUT

_KEPT_AS_IT_IS = frozenset({"v_proj"})
"""Layers whose result the backward pass needs, and of their neighbours' results nothing."""

Layer = TypeVar("Layer")


class Siblings(ABC, Generic[Layer]):
    """Layers of one input.

    Args:
        layers: by name, in the order in which they are called.
    """

    def __init__(self, layers: dict[str, Layer]) -> None:
        self.layers = layers
        self._input: Tensor | None = None
        self._waiting: dict[str, Tensor] = {}

    @abstractmethod
    def compute(self, x: Tensor) -> tuple[Tensor, ...] | None:
        """The results of all layers, in their order; None if they must be computed one by one."""

    def take(self, name: str, x: Tensor) -> Tensor | None:
        """One layer's result; None if it must be computed by itself."""
        if self._input is not x:
            parts = self.compute(x)
            if parts is None:
                return None
            self._input = x
            self._waiting = {
                name: part.contiguous() if name in _KEPT_AS_IT_IS else part
                for name, part in zip(self.layers, parts, strict=True)
            }
        found = self._waiting.pop(name, None)
        if not self._waiting:
            self._input = None
        return found


def of_one_input(model: nn.Module) -> Iterator[dict[str, nn.Module]]:
    """The layers, by name, of each module of a model that has such layers."""
    for module in model.modules():
        children = dict(module.named_children())  # no attributes: a wrapper has those of what it wraps
        for names in OF_ONE_INPUT:
            if all(name in children for name in names):
                yield {name: children[name] for name in names}
