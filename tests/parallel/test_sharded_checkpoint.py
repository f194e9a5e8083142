"""Checkpoints of which each rank writes its own part."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from safetensors.torch import load_file
from split_block import Block, split
from test_train_layouts import run_apart, settings_of
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from fourfold.base.errors import CheckpointError
from fourfold.checkpoint.export import export
from fourfold.checkpoint.folder import list_checkpoints, verify
from fourfold.checkpoint.resume import find_checkpoint
from fourfold.checkpoint.sharded import write_shards
from fourfold.config.load import load
from fourfold.models.shard_files import ShardFiles
from fourfold.parallel.whole import fill, parts_of
from training_runs import losses


def _write(folder: Path, dp: int, tp: int) -> None:
    def work() -> None:
        block = Block()
        write_shards(parts_of(block, split(block, dp, tp)), folder)

    run_ranks(dp * tp, work)


@pytest.mark.parametrize(("dp", "tp"), [(2, 2), (3, 1)])
def test_shards_when_written_under_one_cut_read_under_another(dp: int, tp: int, tmp_path: Path) -> None:
    _write(tmp_path / "shards", dp, tp)

    def read() -> list[str]:
        block = Block()
        parts = parts_of(block, split(block, 1, 2))
        before = {name: part.local.clone() for name, part in parts.items()}
        source = ShardFiles(tmp_path / "shards")
        with torch.no_grad():
            for name, part in parts.items():
                part.local.fill_(-1)
                fill(part, source, name)
        return [name for name, part in parts.items() if not torch.equal(part.local, before[name])]

    assert run_ranks(2, read) == [[], []]


def test_shards_when_read_by_pytorch_itself_are_the_whole_tensors(tmp_path: Path) -> None:
    _write(tmp_path / "shards", 2, 2)
    dcp_to_torch_save(tmp_path / "shards", tmp_path / "whole.pt")
    found = torch.load(tmp_path / "whole.pt", weights_only=True)
    assert all(torch.equal(found[name], tensor) for name, tensor in Block().state_dict().items())


def test_shards_when_no_part_is_written_twice_take_the_bytes_of_the_whole(tmp_path: Path) -> None:
    """A tensor that all ranks hold is written by one."""
    _write(tmp_path / "shards", 2, 2)
    source = ShardFiles(tmp_path / "shards")
    written = sum(chunk.sizes.numel() for name in source.names for chunk in source._entry(name).chunks)
    assert written == sum(p.numel() for p in Block().parameters())


def test_shards_when_the_ranks_do_not_hold_everything_are_refused(tmp_path: Path) -> None:
    def work() -> list[str]:
        block = Block()
        parts = parts_of(block, split(block, 1, 2))
        if dist.get_rank() == 1:
            parts.pop("fused.weight")
        try:
            write_shards(parts, tmp_path / "shards")
        except CheckpointError as error:
            return [str(error)]
        return []

    assert all("fused.weight" in message for (message,) in run_ranks(2, work)), "what is missing must be named"


def test_shards_when_the_table_of_contents_is_not_one_runs_no_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match="no table of contents"):
        ShardFiles(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.fixture(scope="module")
def finished(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Whole runs with sharded checkpoints, from each rank at once, beside the training, and in one process."""
    root = tmp_path_factory.mktemp("runs")
    kinds = {
        "fsdp3": {"save_sharded": True},
        "hsdp4": {"async_save": True},
        "one": {"async_save": True},
        "pp2": {"save_sharded": True},
        "fsdp2xtp2": {"async_save": True},
    }
    for layout, more in kinds.items():
        run_apart(model, data, root / layout, **settings_of("full", layout), **more)
    return {layout: root / layout for layout in kinds}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("fsdp3", "one"),
        ("fsdp3", "hsdp4"),
        ("hsdp4", "fsdp3"),
        ("hsdp4", "one"),
        ("one", "fsdp3"),
        ("fsdp3", "ddp2"),
        ("pp2", "fsdp2xtp2"),
        ("fsdp2xtp2", "pp2"),
    ],
)
def test_resume_when_sharded_goes_on_as_if_never_stopped(
    before: str, after: str, model: Path, data: Path, finished: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished[before], folder)
    shutil.rmtree(folder / "checkpoint-9")
    assert (folder / "checkpoint-6" / "model_shards").is_dir()
    assert not (folder / "checkpoint-6" / "model.safetensors").exists()
    run_apart(model, data, folder, resume_from_checkpoint=True, **settings_of("full", after))
    assert losses(folder) == pytest.approx(losses(finished["one"]), abs=1e-5)


def test_run_when_checkpoints_are_sharded_still_ends_with_a_plain_model(finished: dict[str, Path]) -> None:
    for folder in finished.values():
        assert (folder / "model.safetensors").exists()
        assert [step for step, _ in list_checkpoints(folder)] == [3, 6, 9]


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_resume_when_a_shard_is_damaged_names_it_and_offers_the_one_before(
    damage: str, finished: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished["fsdp3"], folder)
    shard = folder / "checkpoint-9" / "model_shards" / "__1_0.distcp"
    verify(folder / "checkpoint-9")
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-100])
    else:
        shard.unlink()
    with pytest.raises(CheckpointError, match=r"__1_0.distcp: .*checkpoint-6"):
        find_checkpoint(True, folder)


def test_export_when_a_checkpoint_is_sharded_writes_a_plain_model(finished: dict[str, Path], tmp_path: Path) -> None:
    """One process reads it tensor by tensor; the last checkpoint has the weights of the result."""
    target = tmp_path / "model"
    export(load({"model_name_or_path": str(finished["hsdp4"] / "checkpoint-9"), "export_dir": str(target)}))
    found, expected = (load_file(folder / "model.safetensors") for folder in (target, finished["hsdp4"]))
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
