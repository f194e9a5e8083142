"""The command as a user runs it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import fourfold
from fourfold.base.errors import ConfigError
from fourfold.cli import env, session

FOURFOLD = [sys.executable, "-m", "fourfold"]


def run(*words: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **(environment or {})}
    return subprocess.run([*FOURFOLD, *words], capture_output=True, text=True, timeout=60, env=variables, check=False)


def without_heavy_imports(*words: str) -> subprocess.CompletedProcess[str]:
    """Run a command line in a process that fails if torch or transformers was imported."""
    program = (
        "import sys\n"
        "from fourfold.cli.main import main\n"
        f"sys.argv = ['fourfold', *{words!r}]\n"
        "try:\n    main()\n"
        "finally:\n    assert not {'torch', 'transformers', 'datasets'} & set(sys.modules), 'heavy import'\n"
    )
    variables = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=variables, check=False
    )


def _children_s() -> float:
    """Processor time of all commands so far, in seconds: unlike the clock it does not depend on other programs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_when_asked_is_short_and_fast() -> None:
    run("--help")
    begin = _children_s()
    done = run("--help")
    assert _children_s() - begin < 0.5
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) < 25
    assert [
        verb for verb in ("train", "chat", "export", "data", "env", "version", "help") if verb not in done.stdout
    ] == []
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_verb_when_unknown_names_the_nearest() -> None:
    done = run("trian")
    assert done.returncode == 2
    assert "Did you mean 'train'?" in done.stderr


def test_help_when_given_a_key_explains_it() -> None:
    done = without_heavy_imports("help", "cutoff_len")
    assert done.returncode == 0
    assert "Default: 2048" in done.stdout


def test_help_when_the_key_is_unknown_fails_with_a_hint() -> None:
    done = run("help", "cutof_len")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "cutof_len: there is no such key or group. Did you mean cutoff_len?\n"


def test_version_when_asked_prints_it() -> None:
    assert run("version").stdout == f"fourfold {fourfold.version()}\n"


@pytest.mark.parametrize("verb", ["train", "chat", "export", "data"])
def test_verb_when_config_is_wrong_prints_all_problems_before_heavy_imports(tmp_path: Path, verb: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"stge": "sft", "learning_rate": -1, "fp16": "maybe"}), encoding="utf-8")
    done = without_heavy_imports(verb, str(path), "--cutoff_len", "0")
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert [line.partition(":")[0] for line in lines][:4] == ["stge", "cutoff_len", "learning_rate", "fp16"]
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_train_when_fp16_on_cpu_names_the_ways_out() -> None:
    done = without_heavy_imports(
        "train", "model_name_or_path=m", "dataset=d", "output_dir=o", "--do_train", "--fp16", "--seed", "1"
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "Use fp16: false to compute in fp32" in done.stderr


def test_train_when_given_nothing_says_what_to_write() -> None:
    done = run("train")
    assert done.returncode == 2
    assert done.stderr == "train: needs a config. Write `fourfold train FILE.yaml`, or give keys as key=value.\n"


def test_env_when_packages_are_missing_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", nothing)
    monkeypatch.setitem(sys.modules, "torch", None)
    text = env.report()
    rows = dict(line.split(maxsplit=1) for line in text.splitlines())
    assert rows["bitsandbytes"] == "not installed"
    assert "torch import     fails: " in text


def test_clear_errors_when_interrupted_leaves_with_130(capsys: pytest.CaptureFixture[str]) -> None:
    # a shell starts background jobs, perhaps this one, with the signal ignored
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(session.typer.Exit) as caught, session.clear_errors():
        signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, previous)
    assert caught.value.exit_code == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


def test_train_when_called_from_python_raises_config_errors() -> None:
    with pytest.raises(ConfigError, match="cutoff_len: 0 is out of range"):
        fourfold.train({"model_name_or_path": "m"}, cutoff_len=0)


def test_version_when_the_module_is_imported_stays_a_function() -> None:
    import fourfold.version

    assert callable(fourfold.version)
    assert fourfold.version() == fourfold.__version__
