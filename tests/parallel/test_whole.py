"""Parts that ranks hold, and the whole: gathered, written to files and read back, however they were cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from safetensors.torch import load_file, save_file
from split_block import Block, split
from torch import nn

from fourfold.checkpoint.optimizer import gather_optimizer, load_optimizer
from fourfold.models.tensor_files import TensorFiles
from fourfold.parallel.shares import Shares
from fourfold.parallel.whole import fill, gather, parts_of


@pytest.mark.parametrize(("dp", "tp"), [(1, 2), (3, 1), (2, 2)])
def test_gather_when_cut_gives_the_first_rank_the_whole(dp: int, tp: int) -> None:
    def work() -> dict[str, Any]:
        block = Block()
        shares = split(block, dp, tp)
        return dict(gather(parts_of(block, shares)))

    found = run_ranks(dp * tp, work)
    expected = Block().state_dict()
    assert list(found[0]) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[0][name], tensor), name
    for other in found[1:]:
        assert other == dict.fromkeys(expected)


@pytest.mark.parametrize(("dp", "tp"), [(1, 2), (3, 1), (2, 2)])
def test_fill_when_cut_reads_back_the_same_parts(dp: int, tp: int, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(Block().state_dict(), path)

    def work() -> list[str]:
        block = Block()
        shares = split(block, dp, tp)
        parts = parts_of(block, shares)
        before = {name: part.local.clone() for name, part in parts.items()}
        with torch.no_grad():
            for part in parts.values():
                part.local.fill_(-1)
        for name, part in parts.items():
            fill(part, TensorFiles([path]), name)
        return [name for name, part in parts.items() if not torch.equal(part.local, before[name])]

    assert run_ranks(dp * tp, work) == [[]] * dp * tp


def test_gather_when_ranks_hold_different_tensors_names_all_on_each() -> None:
    def work() -> list[tuple[str, Any]]:
        stage = nn.ModuleDict({f"layer{dist.get_rank()}": nn.Linear(2, 2, bias=False), "tied": nn.Linear(2, 1)})
        with torch.no_grad():
            for parameter in stage.parameters():
                parameter.fill_(dist.get_rank())
            stage["tied"].weight.fill_(5)
        return [
            (name, None if tensor is None else tensor.mean().item())
            for name, tensor in gather(parts_of(stage, Shares()))
        ]

    first, second = run_ranks(2, work)
    assert first == [("layer0.weight", 0), ("tied.weight", 5), ("tied.bias", 0), ("layer1.weight", 1)]
    assert second == [(name, None) for name, _ in first]


def test_optimizer_when_saved_under_one_cut_loads_under_another(tmp_path: Path) -> None:
    def train(dp: int, tp: int, *, resume: bool) -> None:
        block = Block()
        shares = split(block, dp, tp)
        optimizer = torch.optim.AdamW(block.parameters(), lr=0.1)
        if resume:
            load_optimizer(optimizer, block, tmp_path / "first", shares)
        else:
            for _ in range(2):
                optimizer.zero_grad()
                block(torch.zeros(1)).backward()
                optimizer.step()
        folder = tmp_path / ("second" if resume else "first")
        state = gather_optimizer(optimizer, block, shares)
        if dist.get_rank() == 0:
            folder.mkdir()
            state.write(folder)

    run_ranks(2, lambda: train(1, 2, resume=False))
    run_ranks(4, lambda: train(2, 2, resume=True))
    saved, again = (load_file(tmp_path / name / "optimizer.safetensors") for name in ("first", "second"))
    assert set(saved) == {f"{name}|{key}" for name in Block().state_dict() for key in ("exp_avg", "exp_avg_sq", "step")}
    assert all(saved[f"{name}|exp_avg"].shape == tensor.shape for name, tensor in Block().state_dict().items())
    assert all(torch.equal(tensor, again[name]) for name, tensor in saved.items())
