"""Memory that runs out, at every place of a run, is told in a few lines that say what to change."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from command import run_here
from fourfold.cli.main import app
from fourfold.training.optimizers import adamw_torch

Words = list[str]


class _Exhausted(torch.optim.SGD):
    """An optimizer that runs out of memory at its third step, as Adam does when it makes its state."""

    steps = 0

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        self.steps += 1
        if self.steps == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has ...")
        super().step()


@pytest.fixture
def tight_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw_torch, "build", lambda groups, *_: _Exhausted(groups, lr=0.1))


@pytest.mark.usefixtures("tight_optimizer")
def test_train_when_the_memory_runs_out_says_where_and_what_to_change(
    words: Words, capsys: pytest.CaptureFixture[str]
) -> None:
    done = run_here(capsys, "train", *words, "max_steps=5")
    assert done.code == 2
    assert "Traceback" not in done.err
    told = done.err[done.err.index("The memory of cpu ran out") :].splitlines()
    assert told[0].startswith("The memory of cpu ran out in step 3 of 5 (peak ")
    keys = [line.split()[1] for line in told[1:-1]]
    again = ["parallel.recompute:"] * 2
    assert keys == ["micro_batch_tokens:", *again, "quantization_bit:", "cutoff_len:"]
    assert told[1].startswith(
        "  1. micro_batch_tokens: 128 instead of 256, or a smaller per_device_train_batch_size (4)"
    )
    assert told[-2] == "  5. cutoff_len: 32, where the longest sample has 64 tokens; longer ones are cut."


@pytest.mark.usefixtures("tight_optimizer")
def test_train_when_the_memory_runs_out_in_a_full_run_names_lora_and_shows_the_place_on_demand(
    words: Words, capsys: pytest.CaptureFixture[str]
) -> None:
    full = ("finetuning_type=full", "gradient_checkpointing=true", "log_level=debug")
    done = run_here(capsys, "train", *words, "max_steps=5", *full)
    assert done.code == 2
    assert "recompute: " not in done.err
    assert "finetuning_type: lora instead of full" in done.err
    assert 'raise torch.OutOfMemoryError("CUDA out of memory' in done.err


@pytest.mark.parametrize("text", ["CUDA out of memory.", "DefaultCPUAllocator: can't allocate memory: you tried ..."])
def test_train_when_the_model_does_not_fit_says_so(
    words: Words, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(text)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    done = run_here(capsys, "train", *words, "quantization_bit=4")
    assert done.code == 2
    assert done.err.splitlines()[-3].startswith("The memory of cpu ran out while the model was loaded (peak ")
    assert done.err.splitlines()[-2].startswith("  1. A smaller model, or a machine with more memory")


def test_train_when_an_error_is_not_of_memory_leaves_it_alone(words: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(adamw_torch, "build", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        app(["train", *words], prog_name="fourfold")
