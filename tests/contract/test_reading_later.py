"""A run looks at what a step found once the next one is begun, whatever the model, and tells the same figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fourfold.dataset.batch import Batch
from fourfold.parallel.step import Running, Step, StepResult
from fourfold.training.loop import Loop
from tiny_models import save_tiny_model
from training_runs import losses, run, write_dataset

_FIGURES = ("loss", "grad_norm")
_OF_EXPERTS = ("expert_max_share", "expert_load_cv")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was begun and read, in order."""
    found: list[str] = []
    begin = Step.begin

    def noted(self: Step, batches: Sequence[Batch], **options: Any) -> Running:
        number = sum(word.startswith("begin") for word in found) + 1
        found.append(f"begin {number}")
        running = begin(self, batches, **options)

        def read() -> StepResult:
            found.append(f"read {number}")
            return running.read()

        return replace(running, read=read)

    monkeypatch.setattr(Step, "begin", noted)
    return found


@pytest.mark.parametrize(("family", "figures"), [("llama", _FIGURES), ("qwen3_moe", _FIGURES + _OF_EXPERTS)])
def test_run_when_nothing_is_due_reads_a_step_once_the_next_is_begun_and_tells_the_same(
    family: str, figures: tuple[str, ...], seen: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_tiny_model(tmp_path / "model", family)
    write_dataset(tmp_path / "data")
    options: dict[str, Any] = {"finetuning_type": "full", "logging_steps": 4, "max_steps": 5, "save_steps": 100}
    run(model, tmp_path / "data", tmp_path / "later", **options)
    later = seen.copy()
    monkeypatch.setattr(Loop, "_may_read_later", lambda self: False)
    run(model, tmp_path / "data", tmp_path / "at_once", **options)
    assert later == [
        *("begin 1", "read 1"),
        *("begin 2", "begin 3", "read 2", "begin 4", "read 3", "read 4"),
        *("begin 5", "read 5"),
    ]
    for name in figures:
        assert losses(tmp_path / "later", name) == losses(tmp_path / "at_once", name) != []
