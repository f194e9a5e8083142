import json
from pathlib import Path

from fourfold.trackers import jsonl
from fourfold.trackers.interface import RunInfo


def info_of(folder: Path, start_step: int = 0) -> RunInfo:
    return RunInfo(output_dir=folder, run_name="run", max_steps=10, start_step=start_step)


def write_steps(folder: Path, steps: range, start_step: int = 0) -> None:
    tracker = jsonl.build(info_of(folder, start_step))
    for step in steps:
        tracker.log(step, {"loss": step / 3, "learning_rate": 1e-5 * step, "epoch": step / 10})
    tracker.finish()


def test_row_has_public_field_names():
    row = jsonl.to_row(
        5,
        222,
        {
            "loss": 2.5,
            "grad_norm": 0.3,
            "learning_rate": 8.695652173913044e-06,
            "epoch": 0.07,
            "tokens_per_sec": 812.5,
            "num_tokens": 4096.0,
            "elapsed_s": 3661.9,
            "remaining_s": 59.0,
            "peak_memory_gib": 1.5,
            "rewards/accuracies": 0.75,
        },
    )
    assert row == {
        "current_steps": 5,
        "total_steps": 222,
        "loss": 2.5,
        "grad_norm": 0.3,
        "lr": 8.695652173913044e-06,
        "epoch": 0.07,
        "throughput": 812.5,
        "total_tokens": 4096,
        "vram_allocated": 1.5,
        "accuracy": 0.75,
        "percentage": 2.25,
        "elapsed_time": "1:01:01",
        "remaining_time": "0:00:59",
    }


def test_resumed_log_equals_uninterrupted_one(tmp_path: Path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    write_steps(whole, range(1, 11))
    write_steps(cut, range(1, 9))
    write_steps(cut, range(6, 11), start_step=5)
    name = jsonl.FILE_NAME
    assert (cut / name).read_bytes() == (whole / name).read_bytes()


def test_log_of_killed_run_loses_only_the_torn_line(tmp_path: Path):
    write_steps(tmp_path, range(1, 4))
    path = tmp_path / jsonl.FILE_NAME
    path.write_text(path.read_text()[:-7])
    assert [row["current_steps"] for row in jsonl.read_rows(path)] == [1, 2]
    write_steps(tmp_path, range(3, 5), start_step=2)
    assert [row["current_steps"] for row in jsonl.read_rows(path)] == [1, 2, 3, 4]


def test_new_run_in_used_folder_starts_an_empty_log(tmp_path: Path):
    write_steps(tmp_path, range(1, 4))
    write_steps(tmp_path, range(1, 2))
    lines = (tmp_path / jsonl.FILE_NAME).read_text().splitlines()
    assert [json.loads(line)["current_steps"] for line in lines] == [1]


def test_row_is_on_disk_before_the_tracker_is_finished(tmp_path: Path):
    tracker = jsonl.build(info_of(tmp_path))
    tracker.log(1, {"loss": 1.0})
    assert len(jsonl.read_rows(tmp_path / jsonl.FILE_NAME)) == 1
    tracker.finish()
