"""Writing what ranks hold of a model, each its own part, by torch.distributed.checkpoint.

PyTorch's planner decides who writes what is held twice, checks that the parts make up the whole, and writes the table
of contents. It is told of parts by their boxes, so it does not matter what cut them.
"""

from __future__ import annotations

import warnings
from collections import ChainMap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save
from transformers import PreTrainedModel

from fourfold.base.errors import CheckpointError
from fourfold.checkpoint.folder import Entry, entries_of, incomplete, write_folder
from fourfold.checkpoint.optimizer import SHARDS, describe_optimizer, split_state, write_numbers
from fourfold.models.shard_files import WEIGHTS
from fourfold.models.weights import model_parts
from fourfold.parallel.shares import Shares
from fourfold.parallel.whole import Box, Part, everyone


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What this rank holds of a model and of its optimizer's state.

    Attributes:
        weights: by the names of the model's state dict; a tied parameter has one of its names.
        optimizer: by `<parameter name>|<state name>`; None without it.
        numbers: what else there is to the optimizer's state.
    """

    weights: Mapping[str, Part]
    optimizer: Mapping[str, Part] | None
    numbers: dict[str, Any]

    def write(
        self, target: Path, write_rest: Callable[[Path], None], rank: int, group: dist.ProcessGroup | None
    ) -> None:
        """Write a checkpoint folder, complete or not at all; every rank must call, all must see the same disk.

        Args:
            write_rest: writes, on rank 0, what else belongs into the folder.
            group: by which ranks agree, on the host; None for the usual one.
        Raises:
            CheckpointError: a rank cannot write.
        """

        def fill(folder: Path) -> Mapping[str, Entry]:
            write_rest(folder)
            if self.optimizer is not None:
                write_numbers(self.numbers, folder)
            return self._write_parts(folder, rank, group)

        if rank == 0:
            write_folder(target, fill)
        else:
            self._write_parts(incomplete(target), rank, group)

    def _write_parts(self, folder: Path, rank: int, group: dist.ProcessGroup | None) -> Mapping[str, Entry]:
        everyone(None, group)  # the folder is there
        write_shards(self.weights, folder / WEIGHTS, group)
        if self.optimizer is not None:
            write_shards(self.optimizer, folder / SHARDS, group)
        # each reads its own files once more, so that nobody has to read all
        own = entries_of(folder, folder.glob(f"*/__{rank}_*"))
        return dict(ChainMap(*everyone(own, group)))


def take_snapshot(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer | None, shares: Shares, *, copied: bool
) -> Snapshot:
    """What this rank holds now; every rank must call.

    Args:
        optimizer: None to leave its state out.
        copied: onto the host, so that training may go on; else what is written is what is there by then.
    """
    weights = model_parts(model, shares)
    state, numbers = (None, {}) if optimizer is None else split_state(optimizer, model, shares)
    described = {} if optimizer is None else describe_optimizer(optimizer, numbers)
    if copied:
        weights = _copied(weights)
        state = None if state is None else _copied(state)
    return Snapshot(weights, state, described)


def _copied(parts: Mapping[str, Part]) -> dict[str, Part]:
    return {name: part.with_local(part.local.to("cpu", copy=True)) for name, part in parts.items()}


class _PartPlanner(DefaultSavePlanner):
    """Plans the writing of parts."""

    def __init__(self, parts: Mapping[str, Part]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._views = {
            _index(name, box): (part, box, part.view(box)) for name, part in parts.items() for box in part.boxes
        }

    def create_local_plan(self) -> SavePlan:
        """One entry for each box that this rank holds."""
        self.plan = SavePlan(
            [
                WriteItem(
                    index,
                    WriteItemType.SHARD,
                    tensor_data=TensorWriteData(
                        chunk=ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes)),
                        properties=TensorProperties(view.dtype),
                        size=torch.Size(part.shape),
                    ),
                )
                for index, (part, box, view) in self._views.items()
            ]
        )
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """The numbers of a box."""
        return self._views[index][2]


def _index(name: str, box: Box) -> MetadataIndex:
    return MetadataIndex(name, torch.Size(box.offsets))


def write_shards(parts: Mapping[str, Part], folder: Path, group: dist.ProcessGroup | None = None) -> None:
    """Write parts into `folder`; every rank must call.

    Args:
        group: by which ranks agree, on the host; None for all ranks.
    Raises:
        CheckpointError: a rank cannot write.
    """
    alone = not dist.is_initialized()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            save(
                dict(parts),
                storage_writer=FileSystemWriter(folder),
                planner=_PartPlanner(parts),
                process_group=group,
                no_dist=alone,
            )
    except CheckpointException as error:
        rank, (problem, _) = next(iter(error.failures.items()))
        if isinstance(problem, OSError):
            raise problem from error
        raise CheckpointError(f"{folder}: rank {rank} cannot write its part ({problem}). Save again.") from error
