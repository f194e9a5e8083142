"""`fourfold rehearse`, as a user runs it, on tensors without numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from command import Done, refusal, run_here
from tiny_models import save_tiny_model

RehearseIt = Callable[..., Done]
_SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "vocab_size": 2048,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
_STAGED = ("strategy=pp", "parallel.pp=2", "parallel.dp_shard=4")
_HARDWARE = ("--gpu", "h100", "--gpus", "8")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config of a small model."""
    folder = tmp_path_factory.mktemp("rehearse")
    model = save_tiny_model(folder / "model", "llama", **_SIZES)
    path = folder / "run.yaml"
    lines = ("finetuning_type: full", "bf16: true", "cutoff_len: 512", "per_device_train_batch_size: 2")
    path.write_text("\n".join([f"model_name_or_path: {model}", *lines]), encoding="utf-8")
    return path


@pytest.fixture
def rehearse(file: Path, capsys: pytest.CaptureFixture[str]) -> RehearseIt:
    """Rehearse the file with some words added."""
    return lambda *words: run_here(capsys, "rehearse", file, *words)


def test_rehearse_when_fake_compares_prediction_and_measurement(rehearse: RehearseIt) -> None:
    done = rehearse(*_HARDWARE, "--fake", "--json", "strategy=fsdp")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    [rank] = found["ranks"]
    assert found["best"]["layout"]["dp_shard"] == 8
    assert rank["predicted_gib"]["parameters"] == rank["measured_gib"]["parameters"]
    assert rank["predicted_gib"]["gradients"] == rank["measured_gib"]["gradients"]
    assert rank["predicted_allocated_gib"] == pytest.approx(rank["measured_allocated_gib"], rel=0.05)
    assert rank["measured_reserved_gib"] is None


def test_rehearse_when_staged_runs_the_ranks_asked_for(rehearse: RehearseIt) -> None:
    done = rehearse(
        *_HARDWARE, "--fake", "--ranks", "first,last", "strategy=pp", "parallel.pp=2", "parallel.dp_shard=4"
    )
    assert done.code == 0, done.err
    assert [line.split()[1] for line in done.out.splitlines() if line.startswith("Rank ")] == ["0", "7"]
    assert max(map(len, done.out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--rank", "8", "--fake"), "rank"),
        (("--ranks", "middle", "--fake"), "middle"),
        ((), "--fake"),
    ],
)
def test_rehearse_when_it_cannot_says_why(words: tuple[str, ...], told: str, rehearse: RehearseIt) -> None:
    assert told in refusal(rehearse(*_HARDWARE, *words))


def test_rehearse_when_it_differs_from_the_run_says_in_what(rehearse: RehearseIt) -> None:
    words = ("stage=dpo", "dataset=pairs", "finetuning_type=lora")
    done = rehearse(*words, "--gpu", "h100", "--fake")
    assert "Of stage dpo the training pass is rehearsed, as sft" in " ".join(done.out.split())
    assert "Layers are rehearsed as they are" in " ".join(done.out.split())
    found = json.loads(rehearse(*words, "max_steps=20", "--gpu", "h100", "--fake", "--json").out)
    assert len(found["notes"]) == 1
    assert json.loads(rehearse("max_steps=20", "--gpu", "h100", "--fake", "--json").out)["notes"] == []
