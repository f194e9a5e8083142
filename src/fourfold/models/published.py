"""A checkpoint's tensors by the names that the model has for them.

Most families have the same names in both. Some are published with other names or in other pieces: mixtures of experts
with a matrix for each expert, where the model has one stack. Transformers' own conversion rules say so; renamings, and
the stacking and joining of matrices, are understood here, so that any rectangle of a stack can be read from the pieces
that it lies in.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming

from fourfold.families.composite import name_alone
from fourfold.models.tensor_files import NamedSource


class UnknownConversionError(Exception):
    """The checkpoint needs more than names and stacking."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One of the checkpoint's tensors in one of the model's.

    Attributes:
        key: its name in the checkpoint.
        index: its place in a stack, which is the model's first dimension and not the piece's; None if there is none.
        start: where its rows begin among those that are joined.
    """

    key: str
    index: int | None = None
    start: int = 0


class Published:
    """The model's tensors, read from a checkpoint.

    Args:
        is_part: the model is a part of the checkpoint's (`families/composite.py`), whose other tensors are left out.
    Raises:
        UnknownConversionError: there is a rule that is not understood here.
    """

    def __init__(self, files: NamedSource, model: PreTrainedModel, *, is_part: bool = False) -> None:
        self._files = files
        self._pieces: dict[str, tuple[Piece, ...]] = {}
        self.unused: list[str] = []
        names = model.state_dict().keys()
        renamings, converters = _rules(model)
        stacks: dict[str, tuple[WeightConverter, dict[str, list[str]]]] = {}
        for key in sorted(files.names, key=_natural):
            name = name_alone(key) if is_part else key
            if name is None:
                continue
            for renaming in renamings:
                name, _ = renaming.rename_source_key(name)
            for converter in converters:
                renamed, pattern = converter.rename_source_key(name)
                if pattern is not None:
                    name = _known(renamed, names, model.base_model_prefix)
                    _, found = stacks.setdefault(name, (converter, {}))
                    found.setdefault(pattern, []).append(key)
                    break
            else:
                name = _known(name, names, model.base_model_prefix)
                self._pieces[name] = (Piece(key),)
            if name not in names:
                self.unused.append(key)
        for name, (converter, found) in stacks.items():
            self._pieces[name] = self._stacked(name, converter, found)

    def _stacked(self, name: str, converter: WeightConverter, found: Mapping[str, list[str]]) -> tuple[Piece, ...]:
        operations = converter.operations
        stacking, joining = operations[:1], operations[1:]
        if (
            len(converter.target_patterns) != 1
            or not all(isinstance(operation, MergeModulelist) and operation.dim == 0 for operation in stacking)
            or not all(isinstance(operation, Concatenate) and operation.dim == 1 for operation in joining)
            or len(joining) > 1
        ):
            raise UnknownConversionError(name)
        pieces, start = [], 0
        for pattern in converter.source_patterns:
            keys = found[pattern]
            pieces += [Piece(key, index, start) for index, key in enumerate(keys)]
            start += self._files.shape(keys[0])[0]
        return tuple(pieces)

    @property
    def names(self) -> Sequence[str]:
        """Of all tensors, by the model's names."""
        return list(self._pieces)

    def __contains__(self, name: object) -> bool:
        """Whether there is such a tensor."""
        return name in self._pieces

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor."""
        return self._files.dtype(self._pieces[name][0].key)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a whole tensor."""
        last = self._pieces[name][-1]
        rows, *rest = self._files.shape(last.key) or (None,)
        if rows is None:
            return ()
        return (last.start + rows, *rest) if last.index is None else (last.index + 1, last.start + rows, *rest)

    def read_into(self, target: Tensor, name: str, offsets: tuple[int, ...]) -> None:
        """Copy a rectangle from the pieces that it lies in."""
        for piece in self._pieces[name]:
            if piece.index is None:
                self._files.read_into(target, piece.key, offsets)
                continue
            first, begin, *columns = offsets
            if not first <= piece.index < first + len(target):
                continue
            rows = self._files.shape(piece.key)[0]
            low, high = max(begin, piece.start), min(begin + target.shape[1], piece.start + rows)
            if low < high:
                part = target[piece.index - first].narrow(0, low - begin, high - low)
                self._files.read_into(part, piece.key, (low - piece.start, *columns))


def _rules(model: PreTrainedModel) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    return renamings, [rule for rule in rules if isinstance(rule, WeightConverter)]


def _known(name: str, names: object, prefix: str) -> str:
    """The name with or without the decoder's prefix, whichever the model has."""
    assert isinstance(names, type({}.keys()))
    for candidate in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
        if candidate in names:
            return candidate
    return name


def _natural(key: str) -> list[tuple[int, str]]:
    """Sorts numbers as numbers: expert 10 after expert 9."""
    return [(int(word), "") if word.isdigit() else (-1, word) for word in re.split(r"(\d+)", key)]
