"""Weights in a sharded checkpoint of PyTorch (torch.distributed.checkpoint), read by rectangles."""

from __future__ import annotations

import pickle
from enum import Enum
from pathlib import Path, PosixPath
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from fourfold.base.errors import CheckpointError

WEIGHTS = "model_shards"
"""Folder of a checkpoint that holds the weights by the names of the model's state dict."""

_METADATA = ".metadata"
_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem", "torch.serialization")


def has_shards(folder: Path) -> bool:
    """Whether a checkpoint's weights are sharded."""
    return (folder / WEIGHTS / _METADATA).exists()


class ShardFiles:
    """The tensors of a folder that torch.distributed.checkpoint has written.

    Raises:
        CheckpointError: there is no such checkpoint, or its table of contents is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._reader = FileSystemReader(folder)
        self._metadata = _read_metadata(folder / _METADATA)
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)

    @property
    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self._metadata.state_dict_metadata)

    def __contains__(self, name: object) -> bool:
        """Whether there is such a tensor."""
        return name in self._metadata.state_dict_metadata

    def _entry(self, name: str) -> TensorStorageMetadata:
        entry = self._metadata.state_dict_metadata[name]
        assert isinstance(entry, TensorStorageMetadata), "only tensors are written"
        return entry

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor."""
        return tuple(self._entry(name).size)

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor."""
        return self._entry(name).properties.dtype

    def read_into(self, target: Tensor, name: str, offsets: tuple[int, ...]) -> None:
        """Copy a rectangle, from however many shards it lies in.

        Raises:
            CheckpointError: a shard is missing or damaged.
        """
        chunk = ChunkStorageMetadata(torch.Size(offsets), target.size())
        items = create_read_items_for_chunk_list(name, self._entry(name), [chunk])
        found = sum(item.lengths.numel() for item in items)
        if found != target.numel():
            raise CheckpointError(f"{self._folder}: has only {found} of {target.numel()} numbers of {name}.")
        try:
            self._reader.read_data(LoadPlan(items), _Into(target)).wait()
        except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, KeyError) as error:
            raise CheckpointError(f"{self._folder}: {name} cannot be read ({error}).") from error


class _Into(DefaultLoadPlanner):
    """Puts whatever is read into one tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__(flatten_state_dict=False)
        self._target = target

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """The tensor that is read into."""
        return self._target


class _MetadataOnly(pickle.Unpickler):
    """Builds a table of contents and nothing else: PyTorch pickles it, and a pickle may run any code."""

    def find_class(self, module: str, name: str) -> Any:
        """The class, if a table of contents is made of it."""
        if (module, name) in (("pathlib", "PosixPath"), ("pathlib._local", "PosixPath")):
            return PosixPath
        if module in _MODULES and (module != "torch.serialization" or name == "_get_layout"):
            return super().find_class(module, name)
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(torch, name)
        if (module, name) == ("builtins", "getattr"):  # as Python 3.11.0 to 3.11.3 pickle a member of an Enum
            return _member
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _member(kind: object, name: str) -> Enum:
    """The member of an Enum, and nothing else that `getattr` could find."""
    if isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__:
        return kind[name]
    raise pickle.UnpicklingError(f"it asks for {name} of {kind}")


def _read_metadata(path: Path) -> Metadata:
    try:
        with path.open("rb") as file:
            metadata = _MetadataOnly(file).load()
    except (OSError, pickle.UnpicklingError, EOFError, AttributeError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: is no table of contents of a sharded checkpoint ({error}).") from error
    assert isinstance(metadata, Metadata)
    return metadata
