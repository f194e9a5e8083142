"""Stage kd by the real command: a student learns from a teacher's folder, and what may be wrong with it is one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from command import Refuse, Train
from fourfold.checkpoint.folder import list_checkpoints
from tiny_models import VOCAB_SIZE, save_tiny_model, tiny_config, tiny_tokenizer
from training_runs import losses, run


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a wider, deeper model of another family, with rows that pad its vocabulary."""
    folder = tmp_path_factory.mktemp("teacher") / "qwen3"
    return save_tiny_model(
        folder, "qwen3", seed=3, hidden_size=64, num_hidden_layers=3, vocab_size=VOCAB_SIZE + 16, initializer_range=0.1
    )


def _kd(teacher: Path, *added: str) -> tuple[str, ...]:
    return ("stage=kd", f"teacher_model={teacher}", "kd_alpha=1", *added)


@pytest.mark.parametrize(
    ("tuning", "file"),
    [
        ("finetuning_type=full bf16=true", "model.safetensors"),
        ("finetuning_type=lora kd_loss=jsd kd_beta=0.3", "adapter_model.safetensors"),
        ("quantization_bit=4 teacher_model_quantization_bit=4 bf16=true", "adapter_model.safetensors"),
        ("kd_loss=reverse_kl flash_attn=disabled compute_accuracy=true", "adapter_model.safetensors"),
    ],
    ids=["full", "lora", "qlora", "padded"],
)
def test_kd_when_trained_comes_nearer_to_the_teacher_and_saves_the_student(
    train: Train, out: Path, teacher: Path, tuning: str, file: str
) -> None:
    train(*_kd(teacher), "max_steps=12", "val_size=4", "eval_strategy=steps", "eval_steps=6", *tuning.split())
    distances = losses(out, "kd_loss")
    assert len(distances) == 12
    assert sum(distances[-3:]) < 0.9 * sum(distances[:3])
    first, last = losses(out, "eval_kd_loss")
    assert last < first
    assert len(losses(out, "ce_loss")) == 12
    assert (out / file).exists()
    config = json.loads((out / ("config.json" if file.startswith("model") else "adapter_config.json")).read_text())
    assert config.get("model_type", "llama") == "llama"


def test_kd_when_the_student_is_the_teacher_starts_at_0(train: Train, out: Path, tiny_llama: Path) -> None:
    train(*_kd(tiny_llama))
    assert losses(out, "kd_loss") == pytest.approx([0.0], abs=1e-6)


def test_kd_when_the_teacher_has_an_adapter_learns_from_both(
    train: Train, out: Path, tiny_llama: Path, tiny_data: Path, tmp_path: Path
) -> None:
    run(tiny_llama, tiny_data, tmp_path / "adapter", max_steps=6)
    train(*_kd(tiny_llama, f"teacher_model_adapters={tmp_path / 'adapter'}", "max_steps=12"))
    distances = losses(out, "kd_loss")
    assert distances[0] > 1e-3
    assert sum(distances[-3:]) < sum(distances[:3])


def test_kd_when_the_teacher_cannot_be_packed_pads_the_rows(train: Train, out: Path, tmp_path: Path) -> None:
    folder = tmp_path / "lfm2"
    sizes = tiny_config("llama").to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    config = AutoConfig.for_model(
        "lfm2", **{name: sizes[name] for name in names}, num_hidden_layers=2, layer_types=["conv", "full_attention"]
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    done = train(*_kd(folder))
    assert "padded in micro-batches" in done.err
    assert losses(out, "kd_loss")[0] > 0


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_kd_when_resumed_goes_on_bit_for_bit(
    tuning: str, tiny_llama: Path, tiny_data: Path, teacher: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "stage": "kd",
        "teacher_model": str(teacher),
        "kd_loss": "jsd",
        "finetuning_type": tuning,
        "learning_rate": 1e-3,
        "max_steps": 6,
    }
    run(tiny_llama, tiny_data, tmp_path / "whole", **settings)
    part = tmp_path / "part"
    run(tiny_llama, tiny_data, part, **settings)
    shutil.rmtree(part / "checkpoint-6")
    run(tiny_llama, tiny_data, part, resume_from_checkpoint=True, **settings)
    assert losses(part) == losses(tmp_path / "whole")
    assert losses(part, "kd_loss") == losses(tmp_path / "whole", "kd_loss")
    assert [step for step, _ in list_checkpoints(part)] == [3, 6]


def test_kd_when_no_teacher_is_given_says_so(refuse: Refuse) -> None:
    assert refuse("stage=kd").startswith("teacher_model: is not given, but stage is kd. Give a hub id")


def test_kd_when_the_teacher_is_not_there_says_so(refuse: Refuse) -> None:
    assert refuse(*_kd(Path("/no/such"))) == "teacher_model: there is no folder /no/such. Give a path that exists."


def test_kd_when_another_stage_has_a_teacher_is_refused(refuse: Refuse, teacher: Path) -> None:
    assert "is for stage kd only, but stage is sft" in refuse(f"teacher_model={teacher}")


def test_kd_when_the_teacher_has_no_head_says_what_it_is(refuse: Refuse, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_config(tiny_config("llama"))
    model.save_pretrained(tmp_path / "classifier")
    tiny_tokenizer().save_pretrained(tmp_path / "classifier")
    line = refuse(*_kd(tmp_path / "classifier"))
    assert line.startswith(
        f"teacher_model: {tmp_path / 'classifier'} is a LlamaForSequenceClassification, which has no"
    )


def test_kd_when_the_teacher_has_another_vocabulary_names_sizes_and_a_token(refuse: Refuse, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    size = len(tokenizer)
    tokenizer.add_tokens(["<other>"])
    folder = save_tiny_model(tmp_path / "other", tokenizer=tokenizer)
    line = refuse(*_kd(folder))
    assert line.startswith(f"teacher_model: the tokenizer of {folder} has {size + 1} tokens and the student's {size}")
    assert "'<other>' with id" in line


def test_kd_when_the_teacher_has_too_few_rows_names_both(refuse: Refuse, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "small", vocab_size=len(tiny_tokenizer()) - 1)
    assert f"has {len(tiny_tokenizer()) - 1} rows for the {len(tiny_tokenizer())} tokens" in refuse(*_kd(folder))


@pytest.mark.parametrize(
    ("added", "expected"),
    [
        (["kd_beta=0.3"], "kd_beta: 0.3 is of kd_loss: jsd only, but kd_loss is forward_kl."),
        (["kd_temperature=0"], "kd_temperature: 0 is out of range."),
        (["kd_alpha=0"], "kd_alpha: 0 is out of range."),
        (["kd_loss=kl"], "kd_loss: 'kl' is not known."),
        (["teacher_model_adapters=/no/such"], "teacher_model_adapters: there is no folder /no/such."),
    ],
    ids=lambda value: value[0].partition("=")[0] if isinstance(value, list) else "",
)
def test_kd_when_a_key_is_wrong_says_which(refuse: Refuse, teacher: Path, added: list[str], expected: str) -> None:
    assert refuse(*_kd(teacher)[:2], *added).startswith(expected)
