"""The benchmark of tokenising and packing, on a few rows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from data_speed import SIDES, compare

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "data_speed.py"


@pytest.mark.slow
@pytest.mark.model
def test_script_when_run_on_a_few_rows_finds_the_same_packs_on_both_sides(tmp_path: Path, smollm2_gguf: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--rows", "300", "--workers", "1", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "data_speed.json").read_text(encoding="utf-8"))
    ours, theirs = (found[f"{side}/300"] for side in SIDES)
    assert ours["targets"] == theirs["targets"] > 300 * 50
    assert ours["packs"] == theirs["packs"] > 10
    for one in (ours, theirs):
        assert one["rows_per_sec"] > 0
        assert one["processor_s"] > 0.1
        assert one["peak_resident_gib"] >= one["peak_gib"] > 0.05


def test_compare_when_the_packs_differ_is_false(capsys: pytest.CaptureFixture[str]) -> None:
    found = {"rows_per_sec": 2.0, "processor_s": 4.0, "peak_gib": 1.0, "packs": 3, "targets": 100}
    assert compare({"fourfold": found, "datasets_map": found})
    assert not compare({"fourfold": found, "datasets_map": {**found, "packs": 4}})
    assert "packs: 3 and 4 differ" in capsys.readouterr().out
