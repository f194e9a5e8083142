"""What is told of how a run is split."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from fourfold.config.load import load
from fourfold.training.machines import choose
from training_runs import config


@pytest.mark.parametrize(
    ("parallel", "told"),
    [
        ({"strategy": "ddp", "tp": 2}, "strategy: ddp has nothing left to split: the sizes under parallel take all 2 "),
        ({"strategy": "fsdp", "dp_replicate": 2}, "strategy: fsdp has nothing left to split"),
        ({"strategy": "tp", "dp_shard": 2}, "strategy: tp has nothing left to split"),
        ({"strategy": "ddp"}, ""),
        ({"strategy": "fsdp", "cp": 2}, ""),
        ({"strategy": "tp", "tp": 2}, ""),
        ({"strategy": "custom", "tp": 2}, ""),
        ({"tp": 2}, ""),
    ],
)
def test_choose_when_sizes_leave_a_strategy_no_ranks_says_what_is_used(
    parallel: dict[str, Any], told: str, tiny_llama: Path, tiny_data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = {name: size for name, size in parallel.items() if name != "strategy"}
    keys = {"use_cpu": True, "parallel": sizes, "strategy": parallel.get("strategy", "auto")}
    run = load(config(tiny_llama, tiny_data, Path("o"), **keys), verb="train")
    with caplog.at_level(logging.INFO):
        layout = choose(run, 2).layout
    lines = [record.getMessage() for record in caplog.records if "strategy: " in record.getMessage()]
    assert len(lines) == bool(told)
    assert all(line.startswith(told) and line.endswith(f"({layout.describe()}).") for line in lines)
