"""The command `fourfold`, run as a user runs it: in this process, or in one of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from fourfold.cli.main import app

Refuse = Callable[..., str]
"""Runs `fourfold train` on the tiny model with some keys and returns the line that refuses them."""

Train = Callable[..., "Done"]
"""Runs `fourfold train` on the tiny model with some keys added, and returns what the command left behind."""

_HEAVY = ("torch", "transformers", "datasets", "peft", "pyarrow", "numpy", "bitsandbytes")

_LIGHT_PROGRAM = """
import sys
from fourfold.cli.main import app
try:
    app(sys.argv[1:])
finally:
    loaded = [name for name in {heavy!r} if name in sys.modules]
    if loaded:
        print("imported: " + ", ".join(loaded), file=sys.stderr)
"""


@dataclass(frozen=True, slots=True)
class Done:
    """What a command left behind.

    Attributes:
        code: its exit code.
        out: standard output.
        err: standard error, which has the log and the errors.
    """

    code: int
    out: str
    err: str


def refusal(done: Done) -> str:
    """The one line of a command that was refused as it should be."""
    assert done.code == 2, done.err
    assert done.out == ""
    assert "Traceback" not in done.err
    line = done.err.splitlines()[-1]
    assert line.endswith((".", "?")), line
    return line


def words_of(keys: Mapping[str, object]) -> list[str]:
    """Keys as the words of a command line."""
    return [f"{key}={json.dumps(value) if isinstance(value, bool | dict) else value}" for key, value in keys.items()]


def run_here(capsys: pytest.CaptureFixture[str], *words: str | Path) -> Done:
    """Run a command line in this process."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        app([str(word) for word in words], prog_name="fourfold")
    out, err = capsys.readouterr()
    code = caught.value.code
    return Done(code if isinstance(code, int) else 0, out, err)


def run_apart(*words: str | Path, **environment: str) -> Done:
    """Run a command line in a process of its own."""
    return _run([sys.executable, "-m", "fourfold", *map(str, words)], environment)


def run_light(*words: str | Path, heavy: tuple[str, ...] = _HEAVY) -> Done:
    """Run a command line in a process of its own that names on standard error the heavy modules it imported."""
    return _run([sys.executable, "-c", _LIGHT_PROGRAM.format(heavy=heavy), *map(str, words)], {})


def _run(command: list[str], environment: dict[str, str]) -> Done:
    variables = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=variables, check=False)
    return Done(done.returncode, done.stdout, done.stderr)
