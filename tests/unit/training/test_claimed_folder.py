"""A run's folder is its own while it is at work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fourfold.base.errors import ConfigError
from fourfold.config.load import load
from fourfold.config.schema import Run
from fourfold.training import folder

_HOLDER = """
import sys
from fourfold.config.load import load
from fourfold.training import folder
keys = {"model_name_or_path": "m", "dataset": "d", "output_dir": sys.argv[1]}
folder.claim(load(keys, verb="train"))
print("claimed", flush=True)
sys.stdin.read()
"""

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="has no such locks")


def run_in(output_dir: Path) -> Run:
    return load({"model_name_or_path": "m", "dataset": "d", "output_dir": str(output_dir)}, verb="train")


def test_folder_when_another_run_is_at_work_in_it_is_refused_until_it_ends(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _HOLDER, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "claimed\n"
        with pytest.raises(ConfigError, match="output_dir: another run is at work"):
            folder.claim(run_in(tmp_path / "out"))
        other.communicate()
    try:
        assert folder.claim(run_in(tmp_path / "out")) == tmp_path / "out"
        assert folder.claim(run_in(tmp_path / "out")) == tmp_path / "out"  # of this process
    finally:
        folder.release()


def test_folder_when_nothing_was_written_into_it_is_there_again_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    for name in ("old", "new", "used"):
        folder.claim(run_in(tmp_path / name))
    (tmp_path / "used" / "file").touch()
    folder.release()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old", "used"]
