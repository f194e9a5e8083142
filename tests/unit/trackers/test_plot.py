from pathlib import Path

import pytest

from fourfold.trackers import jsonl
from fourfold.trackers.interface import RunInfo
from fourfold.trackers.reports.plot import plot_losses, smooth

PNG = b"\x89PNG\r\n\x1a\n"


def test_plot_writes_one_png_for_each_loss(tmp_path: Path):
    tracker = jsonl.build(RunInfo(tmp_path, "run", 20))
    for step in range(1, 21):
        tracker.log(step, {"loss": 3.0 / step})
        if step % 5 == 0:
            tracker.log(step, {"eval_loss": 4.0 / step, "eval_identity_loss": 1.0, "eval_runtime": 2.0})
    tracker.finish()
    written = plot_losses(tmp_path)
    assert [path.name for path in written] == [
        "training_loss.png",
        "training_eval_identity_loss.png",
        "training_eval_loss.png",
    ]
    assert all(path.read_bytes().startswith(PNG) for path in written)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_plot_without_two_finite_points_writes_nothing(tmp_path: Path):
    assert plot_losses(tmp_path) == []
    tracker = jsonl.build(RunInfo(tmp_path, "run", 2))
    tracker.log(1, {"loss": 1.0})
    tracker.log(2, {"loss": float("nan")})
    tracker.finish()
    assert plot_losses(tmp_path) == []


def test_smooth_by_hand():
    # 20 points: window 2, a = 2/3; the first two averages are (2/3 x1)/(2/3) and (2/9 x1 + 2/3 x2)/(8/9)
    values = [9.0, 3.0] + [0.0] * 18
    assert smooth(values)[:2] == pytest.approx([9.0, 4.5])


def test_smooth_of_few_points_changes_nothing():
    assert smooth([3.0, 1.0, 2.0]) == [3.0, 1.0, 2.0]


def test_plot_when_names_have_no_glyphs_draws_without_a_warning(tmp_path: Path, recwarn: pytest.WarningsRecorder):
    folder = tmp_path / "训练输出"
    folder.mkdir()
    tracker = jsonl.build(RunInfo(folder, "run", 2))
    for step in (1, 2):
        tracker.log(step, {"loss": 3.0 / step, "eval_对话_loss": 1.0})
    tracker.finish()
    assert len(plot_losses(folder)) == 2
    assert [str(warning.message) for warning in recwarn] == []
