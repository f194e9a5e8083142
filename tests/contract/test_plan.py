"""`fourfold plan`, as a user runs it."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from command import Done, refusal, run_here
from fourfold.config.load import load
from fourfold.planning.layout import resolve_layout

MODELS = Path(__file__).parents[2] / "examples" / "models"

CONFIG = """\
# a run to plan
model_name_or_path: {model}
finetuning_type: full   # every weight
bf16: true
cutoff_len: 4096
per_device_train_batch_size: 4
"""

PlanIt = Callable[..., Done]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A config without data and without a folder for results."""
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG.format(model=MODELS / "Llama-3-8B"), encoding="utf-8")
    return path


@pytest.fixture
def plan(file: Path, capsys: pytest.CaptureFixture[str]) -> PlanIt:
    """Plan the file with some words added."""

    def plan(*words: str) -> Done:
        return run_here(capsys, "plan", file, *words)

    return plan


def _json(done: Done) -> dict[str, object]:
    assert done.code == 0, done.err
    return json.loads(done.out)


def test_plan_when_hardware_is_named_prints_the_report(plan: PlanIt) -> None:
    done = plan("--gpu", "h100", "--gpus", "8")
    assert done.code == 0, done.err
    assert done.err == ""
    assert max(map(len, done.out.splitlines())) <= 80
    assert "CONFIG: the lines for the first layout" in done.out


def test_plan_when_keys_are_added_obeys_them(plan: PlanIt) -> None:
    done = plan("--gpu", "h200", "--gpus", "8", "--nodes", "2", "--json", "parallel.tp=4", "--cutoff_len", "2048")
    layouts = _json(done)["layouts"]
    assert isinstance(layouts, list)
    assert {entry["layout"]["tp"] for entry in layouts} == {4}


def test_plan_when_hardware_is_in_a_file_reads_it(plan: PlanIt, tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text("gpu: h100\ngpus: 8\nnodes: 2\n", encoding="utf-8")
    best = _json(plan("--hardware", str(tmp_path / "cluster.yaml"), "--json"))["best"]
    assert isinstance(best, dict)
    sizes = best["layout"]
    assert sizes["dp_replicate"] * sizes["dp_shard"] * sizes["cp"] * sizes["tp"] * sizes["pp"] == 16


def test_plan_when_told_to_write_changes_only_its_lines(plan: PlanIt, file: Path) -> None:
    before = file.read_text(encoding="utf-8")
    done = plan("--gpu", "h100", "--gpus", "8", "--json", "--write")
    after = file.read_text(encoding="utf-8")
    assert after.startswith(before)
    sizes = _json(done)["best"]["layout"]  # type: ignore[index]
    layout = resolve_layout(load(file).parallel, 8)
    assert {name: sizes[name] for name in layout.sizes()} == layout.sizes()
    again = plan("--gpu", "h100", "--gpus", "8", "--json", "--write")
    assert _json(again)["best"]["layout"] == sizes  # type: ignore[index]
    assert file.read_text(encoding="utf-8") == after


def test_plan_when_told_to_write_without_a_file_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(run_here(capsys, "plan", f"model_name_or_path={MODELS / 'Llama-3-8B'}", "--write", "--gpu", "h100"))
    assert line.startswith("write: needs a config file")


def test_plan_when_nothing_fits_tells_what_would_and_writes_nothing(plan: PlanIt, file: Path) -> None:
    before = file.read_text(encoding="utf-8")
    done = plan("--gpu", "rtx4090")
    assert done.code == 1
    assert "NOTHING FITS" in done.out
    assert "finetuning_type: lora" in done.out
    done = plan("--gpu", "rtx4090", "--write")
    assert done.code == 2
    assert "nothing fits" in done.err
    assert file.read_text(encoding="utf-8") == before


def test_plan_when_told_to_plot_draws(plan: PlanIt, tmp_path: Path) -> None:
    assert plan("--gpu", "h100", "--gpus", "8", "--plot", str(tmp_path / "plan.png")).code == 0
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "h1000"], "gpu: 'h1000' is not known. Did you mean h100"),
        (["--gpu", "h100", "--gpus", "0"], "gpus: 0 is out of range"),
        (["--gpu", "h100", "--nodes", "-1"], "nodes: -1 is out of range"),
        (["--gpu", "h100", "--gpus", "6", "parallel.tp=4"], "parallel: tp 4 make 4 ranks"),
        (["--gpu", "h100", "--gpus", "3", "parallel.tp=3"], "parallel.tp: 3 "),
        (["--gpu", "t4"], "dtype: NVIDIA T4 16GB has no bf16"),
        (["--hardware", "none.yaml"], "none.yaml: cannot be read"),
        (["--hardware", "none.yaml", "--gpu", "h100"], "hardware: none.yaml and --gpu contradict each other"),
        (["--gpu", "h100", "model_name_or_path="], "model_name_or_path: is not given"),
        (["--gpu", "h100", "cutof_len=5"], "cutof_len: there is no such key"),
    ],
)
def test_plan_when_the_input_is_bad_says_what_is(plan: PlanIt, words: list[str], message: str) -> None:
    assert refusal(plan(*words)).startswith(message)


def test_plan_when_there_is_no_gpu_and_no_flag_asks_for_one(plan: PlanIt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    line = refusal(plan())
    assert line.startswith("gpu: this machine has none")
    assert "--gpu h100" in line


def test_plan_when_the_folder_has_no_config_says_so(plan: PlanIt, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    line = refusal(plan("--gpu", "h100", f"model_name_or_path={tmp_path / 'empty'}"))
    assert line.endswith("holds no config.json. Give the folder that does, or a .gguf file.")


@pytest.mark.parametrize("content", ['{"model_type": "no_such_model"}', "{}", '{"model_type": "vit"}'])
def test_plan_when_the_architecture_is_unknown_says_so(plan: PlanIt, tmp_path: Path, content: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(content, encoding="utf-8")
    line = refusal(plan("--gpu", "h100", f"model_name_or_path={tmp_path / 'model'}"))
    assert line.startswith("model_name_or_path: ")


def test_plan_when_the_cutoff_exceeds_the_context_warns(plan: PlanIt) -> None:
    done = plan("--gpu", "h100", "--gpus", "8", "cutoff_len=16384")
    assert done.code == 0
    assert "cutoff_len: 16384 is more than the 8192 positions of the model" in done.err
    assert plan("--gpu", "h100", "--gpus", "8", "cutoff_len=16384", "rope_scaling=yarn").err == ""


def test_plan_when_the_precision_is_full_warns(plan: PlanIt) -> None:
    assert "this plans for fp32" in plan("--gpu", "h100", "--gpus", "8", "bf16=false").err


def test_plan_when_the_shape_is_known_is_quick_and_imports_nothing_heavy(plan: PlanIt, file: Path) -> None:
    plan("--gpu", "h100", "--gpus", "8")  # the shape is known from here on
    program = (
        "import sys\n"
        "from fourfold.cli.main import main\n"
        f"sys.argv = ['fourfold', 'plan', {str(file)!r}, '--gpu', 'h100', '--gpus', '8', '--json']\n"
        "try:\n    main()\n"
        "finally:\n    assert not {'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules), 'heavy import'\n"
    )
    # modules are compiled once, as an installation has them, also where Python is told not to
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(file.parent / "bytecode")}
    took = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=env, check=False
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["best"] is not None
        took.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(took) < 1  # processor time: unlike the clock it depends little on other programs
