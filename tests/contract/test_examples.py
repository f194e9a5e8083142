"""Every shipped config is a valid one as it stands, and does what it says on a tiny model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fourfold.config import device
from fourfold.config.load import load
from fourfold.config.rules import Verb
from fourfold.dataset.stage_rows import check_named
from project_copy import EXAMPLES, ROOT, make_project, run_command

_ASKED = "Who are you?\nexit\n"
_FIRST = "lora_sft.yaml"
"""Trains the adapter that chat.yaml and export.yaml name."""


def verb_of(name: str) -> Verb:
    """The verb that the comment at the top of an example shows; JSON has no comments, and is for training."""
    if name.endswith(".json"):
        return "train"
    shown = re.search(rf"^#   fourfold (\w+) examples/{re.escape(name)}$", (ROOT / "examples" / name).read_text(), re.M)
    assert shown is not None, f"{name} does not begin with the command that runs it"
    verb = shown[1]
    assert verb in ("train", "chat", "export", "data")
    return verb


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project in which the first example has run."""
    folder = make_project(tmp_path_factory.mktemp("project"))
    done = run_command(folder, "train", f"examples/{_FIRST}")
    assert done.exit_code == 0, done.output
    return folder


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_when_loaded_as_it_is_has_nothing_wrong(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    # a visible GPU, which fp16 needs
    monkeypatch.setattr(device, "DRIVER_FILES", ((tmp_path.parent, tmp_path.name),))
    run = load(ROOT / "examples" / name, verb=verb_of(name))
    check_named(run)
    assert run.notes == ()


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name != _FIRST])
def test_example_when_run_on_a_tiny_model_does_what_it_says(name: str, project: Path) -> None:
    verb = verb_of(name)
    done = run_command(project, verb, f"examples/{name}", typed=_ASKED if verb == "chat" else "")
    assert done.exit_code == 0, done.output
    run = load(project / "examples" / name)
    if verb == "train":
        assert (project / str(run.output.output_dir) / "train_results.json").exists()
    elif verb == "export":
        assert (project / str(run.export.export_dir) / "model.safetensors").exists()
    else:
        assert "Assistant: " in done.output


def test_examples_when_listed_have_folders_of_their_own() -> None:
    runs = [load(ROOT / "examples" / name) for name in EXAMPLES]
    folders = [run.output.output_dir for run in runs if run.output.output_dir]
    assert len(folders) == len(set(folders))
