import logging
from pathlib import Path

import pytest

from fourfold.base.errors import ConfigError
from fourfold.trackers import interface
from fourfold.trackers.console import ConsoleTracker
from fourfold.trackers.interface import RunInfo, open_trackers
from fourfold.trackers.jsonl import Jsonl


@pytest.mark.parametrize("names", [(), ("none",), ("console", "jsonl"), ("none", "jsonl")])
def test_open_trackers_always_has_console_and_jsonl(names: tuple[str, ...], tmp_path: Path):
    trackers = open_trackers(names, RunInfo(tmp_path, "run", 3))
    assert [type(tracker) for tracker in trackers] == [Jsonl, ConsoleTracker]
    for tracker in trackers:
        tracker.finish()


def test_open_trackers_with_unknown_name_names_the_nearest(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"report_to: 'tensorbord' is not known. Did you mean tensorboard\?"):
        open_trackers(["tensorbord"], RunInfo(tmp_path, "run", 3))


def test_open_trackers_with_all_takes_the_installed_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(interface.importlib.util, "find_spec", lambda name: None if name != "tensorboard" else object())
    with caplog.at_level(logging.INFO, logger="fourfold"):
        trackers = open_trackers(["all"], RunInfo(tmp_path, "run", 3))
    for tracker in trackers:
        tracker.finish()
    assert len(trackers) == 3
    assert "all stands for tensorboard" in caplog.text


@pytest.mark.parametrize(
    ("name", "grouped"),
    [("loss", "train/loss"), ("eval_loss", "eval/loss"), ("rewards/margins", "train/rewards/margins")],
)
def test_grouped_name(name: str, grouped: str):
    assert interface.grouped_name(name) == grouped
