import json
from pathlib import Path

from fourfold.trackers.reports.results import format_results, speed, write_results


def test_speed_by_hand():
    assert speed("train", 10.0, num_samples=25, num_steps=3) == {
        "train_runtime": 10.0,
        "train_samples_per_second": 2.5,
        "train_steps_per_second": 0.3,
    }


def test_results_are_merged_into_all_results(tmp_path: Path):
    write_results(tmp_path, "train", {"train_loss": 1.5, "epoch": 3.0})
    path = write_results(tmp_path, "eval", {"eval_loss": 1.25, "epoch": 3.0})
    assert json.loads(path.read_text()) == {"eval_loss": 1.25, "epoch": 3.0}
    assert json.loads((tmp_path / "train_results.json").read_text()) == {"train_loss": 1.5, "epoch": 3.0}
    merged = (tmp_path / "all_results.json").read_text()
    assert json.loads(merged) == {"epoch": 3.0, "eval_loss": 1.25, "train_loss": 1.5}
    assert list(json.loads(merged)) == ["epoch", "eval_loss", "train_loss"]


def test_format_results_is_aligned():
    block = format_results("train", {"train_loss": 1.5, "epoch": 3.0, "train_runtime": 61.2, "total_flos": 1.25e12})
    assert block == (
        "***** train metrics *****\n"
        "  epoch         =   3.0000\n"
        "  total_flos    = 1.25e+12\n"
        "  train_loss    =   1.5000\n"
        "  train_runtime =  0:01:01"
    )
