"""The table of contents of a sharded checkpoint: whatever version of Python pickled it, and nothing but that."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import metadata as dcp

from fourfold.base.errors import CheckpointError
from fourfold.models.shard_files import WEIGHTS, ShardFiles


class _AsGetattr:
    """Pickled as `getattr(owner, name)`: as Python 3.11.0 to 3.11.3 pickle a member of an Enum."""

    def __init__(self, owner: Any, name: str) -> None:
        self._owner, self._name = owner, name

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._owner, self._name)


def _written(folder: Path, memory_format: Any) -> Path:
    properties = dcp.TensorProperties(dtype=torch.float32)
    table = dcp.Metadata({"w": dcp.TensorStorageMetadata(properties, torch.Size([2]), [])}, storage_data={})
    table.planner_data = memory_format  # anywhere in it
    (folder / WEIGHTS).mkdir()
    (folder / WEIGHTS / ".metadata").write_bytes(pickle.dumps(table))
    return folder / WEIGHTS


def test_table_when_a_member_is_pickled_by_getattr_is_read(tmp_path: Path) -> None:
    member = _AsGetattr(dcp._MEM_FORMAT_ENCODING, "TORCH_CONTIGUOUS_FORMAT")
    assert ShardFiles(_written(tmp_path, member))._metadata.planner_data is (
        dcp._MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT
    )


@pytest.mark.parametrize(
    ("owner", "name"), [(dcp._MEM_FORMAT_ENCODING, "mro"), (dcp.TensorProperties, "create_from_tensor")]
)
def test_table_when_getattr_would_find_something_else_is_refused(tmp_path: Path, owner: Any, name: str) -> None:
    with pytest.raises(CheckpointError, match="is no table of contents"):
        ShardFiles(_written(tmp_path, _AsGetattr(owner, name)))
