"""Ranks that do not belong together are told apart before anything is trained; memory is told of all of them."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks

from fourfold.base.errors import PlanError
from fourfold.base.log import setup_logging
from fourfold.config.load import load
from fourfold.planning.hardware import build_cluster
from fourfold.planning.layout import Layout
from fourfold.training import assemble, auto
from fourfold.training.machines import Choice, agree
from fourfold.training.ranks import RankFacts, compare_ranks
from tiny_models import save_tiny_model
from training_runs import run, write_dataset

_VERSIONS = {"fourfold": "1.0", "torch": "2.13.0"}
_KEYS = {"model_name_or_path": "m", "output_dir": "o", "dataset": "d"}
_CONFIG = {"seed": "42", "parallel.tp": "1"}


def _compare(*ranks: RankFacts) -> list[tuple[str, list[str]]]:
    """What each rank is told: the error, and the warnings."""

    def work() -> tuple[str, list[str]]:
        told: list[str] = []
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: told.append(record.getMessage())
        logging.getLogger("fourfold").addHandler(handler)
        try:
            compare_ranks(ranks[dist.get_rank()])
        except PlanError as error:
            return str(error), told
        return "", told

    return run_ranks(len(ranks), work)


def test_ranks_when_versions_and_configs_are_equal_are_accepted_in_silence() -> None:
    facts = RankFacts.of(
        load({"model_name_or_path": "m", "output_dir": "o", "dataset": "d"}, verb="train"), torch.device("cpu")
    )
    assert facts.config["parallel.tp"] == "None"
    assert _compare(facts, facts) == [("", [])] * 2


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            RankFacts({**_VERSIONS, "torch": "2.11.0"}, _CONFIG),
            "torch: rank 0 has version 2.13.0, rank 2 has 2.11.0. Install the same versions on every machine.",
        ),
        (
            RankFacts(_VERSIONS, {**_CONFIG, "parallel.tp": "2"}),
            "parallel.tp: rank 0 has 1, rank 2 has 2. Start every machine with the same config file and arguments.",
        ),
    ],
)
def test_ranks_when_one_differs_are_all_told_which_and_in_what(other: RankFacts, message: str) -> None:
    same = RankFacts(_VERSIONS, _CONFIG)
    assert _compare(same, same, other) == [(message, [])] * 3


def test_ranks_when_gpus_differ_are_warned_of_once() -> None:
    large, small = (RankFacts(_VERSIONS, _CONFIG, gpu) for gpu in ("NVIDIA H100", "NVIDIA A100"))
    first, second = _compare(large, small)
    assert first[0] == second[0] == ""
    assert len(first[1]) == 1
    assert "NVIDIA H100 (rank 0), NVIDIA A100 (rank 1)" in first[1][0]
    assert second[1] == []


def test_run_when_split_reports_the_peak_memory_of_all_ranks(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_dataset(tmp_path / "data")
    model = save_tiny_model(tmp_path / "model")
    run(model, tmp_path / "data", tmp_path / "run", nproc=2, strategy="fsdp", max_steps=2, save_strategy="no")
    results = json.loads((tmp_path / "run" / "all_results.json").read_text(encoding="utf-8"))
    assert 0 < results["peak_memory_gib_min"] <= results["peak_memory_gib_max"]
    assert {results["peak_memory_min_rank"], results["peak_memory_max_rank"]} <= {0, 1}
    assert capfd.readouterr().err.count("Peak memory of the ranks:") == 1


def test_run_when_auto_plans_for_gpus_splits_all_ranks_alike_and_ends_with_a_forecast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for module in (auto, assemble):  # workers are forked, and see it too
        monkeypatch.setattr(module, "cluster_of_job", lambda run, world_size: build_cluster("h100", world_size))
    monkeypatch.setenv("FOURFOLD_CACHE", str(tmp_path / "cache"))
    write_dataset(tmp_path / "data")
    model = save_tiny_model(tmp_path / "model")
    keys = {"nproc": 2, "parallel": {"tp": 2}, "max_steps": 2, "save_strategy": "no", "bf16": True}
    setup_logging()
    results = run(model, tmp_path / "data", tmp_path / "run", **keys)
    told = capfd.readouterr().err
    assert told.count("strategy: auto takes tp 2 on 2 x NVIDIA H100") == 1
    assert told.count("predicted  measured") == 1
    assert results["predicted_peak_memory_gib"] > 0
    facts = json.loads((tmp_path / "run" / "datasets.json").read_text(encoding="utf-8"))
    assert facts["layout"]["tp"] == 2


def test_choice_when_ranks_would_choose_differently_is_that_of_rank_0() -> None:
    def work() -> Layout:
        mine = Choice(Layout(dp_shard=2) if dist.get_rank() == 0 else Layout(tp=2))
        return agree(load(_KEYS, verb="train"), mine).layout

    assert run_ranks(2, work) == [Layout(dp_shard=2)] * 2


def test_choice_when_rank_0_finds_a_fault_is_refused_by_all() -> None:
    def work() -> list[str]:
        with pytest.raises(PlanError) as caught:
            agree(load({**_KEYS, "parallel": {"tp": 3}}, verb="train"), None)
        return [str(caught.value)]

    (first,), (second,) = run_ranks(2, work)
    assert first == second
    assert "tp 3 make 3 ranks, but there are 2 processes" in first
