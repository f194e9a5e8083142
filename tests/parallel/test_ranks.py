"""Ranks that do not belong together are told apart before anything is trained; memory is told of all of them."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks

from data_folder import alpaca_rows, prepare_run, write_set
from fourfold.base.errors import FourfoldError, PlanError
from fourfold.base.log import setup_logging
from fourfold.config.load import load
from fourfold.planning.hardware import build_cluster
from fourfold.planning.layout import Layout
from fourfold.training import assemble, auto
from fourfold.training.machines import Choice, agree
from fourfold.training.ranks import RankFacts, compare_ranks, prepare_alike
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


def _prepare_by_rank(num_ranks: int, folders: Sequence[Path], **keys: Any) -> list[str]:
    """What each rank is told that prepares the data of its own folder, in a cache of its own."""

    def work() -> list[str]:
        folder = folders[dist.get_rank()]
        os.environ["FOURFOLD_CACHE"] = str(folder / "cache")
        try:
            data = prepare_alike(lambda: prepare_run(folder, **{"dataset": "tiny", **keys}))
        except FourfoldError as error:
            return [re.sub(rf" \({socket.gethostname()}\)", "", str(error))]
        return ["" if data.train is None and data.stream is None else "prepared"]

    return [told for (told,) in run_ranks(num_ranks, work)]


@pytest.fixture
def rows(tmp_path: Path) -> Callable[..., Path]:
    """Writes a folder with a data set `tiny` of alpaca rows."""

    def write(name: str, number: int, answer: str = "answer") -> Path:
        return write_set(tmp_path / name, "tiny", alpaca_rows(number, answer=answer), file="tiny.jsonl")

    return write


_STREAMED: dict[str, Any] = {"streaming": True, "max_steps": 2}


@pytest.mark.parametrize("keys", [{}, {"val_size": 2}, _STREAMED, {"stage": "pt", "cutoff_len": 16}])
def test_data_when_folders_differ_but_not_their_files_is_accepted(
    rows: Callable[..., Path], keys: dict[str, Any]
) -> None:
    assert _prepare_by_rank(2, [rows("a", 6), rows("b", 6)], **keys) == ["prepared"] * 2


@pytest.mark.parametrize(
    ("number", "answer", "keys", "message"),
    [
        (
            5,
            "answer",
            {},
            "dataset: {} other data (train) than rank 0: 5 samples of tiny with 195 tokens, not 6 with 234.",
        ),
        (6, "anywho", {}, "dataset: {} other data (train) than rank 0: as much of tiny, but not the same."),
        (6, "anywho", _STREAMED, "dataset: {} other data (train) than rank 0: its files are not the same."),
        (
            6,
            "anywho",
            {"eval_dataset": "tiny", "dataset": ""},
            "eval_dataset: {} other data (eval) than rank 0: as much",
        ),
    ],
)
def test_data_when_a_machine_has_other_files_is_refused_by_every_rank(
    rows: Callable[..., Path], number: int, answer: str, keys: dict[str, Any], message: str
) -> None:
    first, other = rows("a", 6), rows("b", number, answer)
    told = _prepare_by_rank(3, [first, other, other], **{"dataset": "tiny", **keys})
    assert len(set(told)) == 1
    assert told[0].startswith(message.format("ranks 1 to 2 have"))
    assert told[0].endswith("Put the same files on every machine.")
    told = _prepare_by_rank(2, [first, other], **{"dataset": "tiny", **keys})
    assert told[1].startswith(message.format("rank 1 has"))


def test_data_when_a_machine_has_no_file_ends_every_rank(rows: Callable[..., Path]) -> None:
    first, other = rows("a", 6), rows("b", 6)
    (other / "tiny.jsonl").unlink()
    fine, faulty = _prepare_by_rank(2, [first, other])
    assert faulty.startswith(f"{other / 'tiny.jsonl'}: ")
    assert fine == f"rank 1 has no data to train on: {faulty}"


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
