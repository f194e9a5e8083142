"""A run that was stopped - killed, interrupted, out of disk - goes on exactly as if it had not been."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from fourfold.base.errors import CheckpointError, ConfigError, RunInterruptedError
from fourfold.checkpoint.folder import list_checkpoints
from fourfold.config.load import load
from fourfold.training.run import train
from tiny_models import save_tiny_model
from training_runs import config, losses, run

_FORK = multiprocessing.get_context("fork")
_STEPS = 12


def _wait_for_step(output: Path, step: int, process: Any) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.is_alive():
        if (output / "trainer_log.jsonl").exists() and len(losses(output)) >= step:
            return
        time.sleep(0.005)


def _start_and_kill(cfg: dict[str, Any], step: int, number: int) -> int | None:
    """Train in a process of its own and send it a signal once `step` steps are logged; returns its exit code."""
    process = _FORK.Process(target=lambda: train(load(cfg, verb="train")))
    process.start()
    _wait_for_step(Path(cfg["output_dir"]), step, process)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join(60)
    return process.exitcode


def _weights(output: Path) -> bytes:
    files = [*output.glob("adapter_model.safetensors"), *output.glob("model.safetensors")]
    return b"".join(path.read_bytes() for path in files)


_VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {"lora_dropout": 0.1, "loraplus_lr_ratio": 4.0, "neftune_noise_alpha": 5},
    "full": {"finetuning_type": "full", "learning_rate": 1e-3, "bf16": True},
    "freeze": {"finetuning_type": "freeze", "freeze_trainable_layers": 1, "optim": "adafactor"},
    "qlora": {"quantization_bit": 4, "pure_bf16": False},
}


@pytest.mark.parametrize("variant", sorted(_VARIANTS))
def test_resume_when_killed_continues_bit_for_bit(
    variant: str, tiny_llama: Path, tiny_data: Path, tmp_path: Path
) -> None:
    overrides = _VARIANTS[variant]
    run(tiny_llama, tiny_data, tmp_path / "whole", **overrides)
    killed = tmp_path / "killed"
    code = _start_and_kill(config(tiny_llama, tiny_data, killed, **overrides), 8, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert [step for step, _ in list_checkpoints(killed)][-1] < _STEPS
    run(tiny_llama, tiny_data, killed, resume_from_checkpoint=True, **overrides)
    assert losses(killed) == losses(tmp_path / "whole")
    assert len(losses(killed)) == _STEPS
    assert _weights(killed) == _weights(tmp_path / "whole")
    histories = [json.loads((folder / "trainer_state.json").read_text()) for folder in (killed, tmp_path / "whole")]
    assert histories[0]["log_history"] == histories[1]["log_history"]
    assert histories[0]["total_flos"] == histories[1]["total_flos"]


def test_resume_when_experts_are_saved_under_published_names_continues(tiny_data: Path, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", "qwen3_moe")
    settings = {"finetuning_type": "full", "learning_rate": 1e-3, "max_steps": 6, "moe_aux_loss_coef": 0.01}
    run(model, tiny_data, tmp_path / "whole", **settings)
    part = tmp_path / "part"
    run(model, tiny_data, part, **settings)
    shutil.rmtree(part / "checkpoint-6")
    run(model, tiny_data, part, resume_from_checkpoint=True, **settings)
    assert losses(part) == losses(tmp_path / "whole")
    assert _weights(part) == _weights(tmp_path / "whole")


def test_resume_when_optimizer_state_is_dropped_differs(tiny_llama: Path, tiny_data: Path, tmp_path: Path) -> None:
    """The control of the test above: with weights alone the losses are others."""
    run(tiny_llama, tiny_data, tmp_path / "whole")
    run(tiny_llama, tiny_data, tmp_path / "part", max_steps=_STEPS)
    folder = list_checkpoints(tmp_path / "part")[1][1]
    adapter = run(tiny_llama, tiny_data, tmp_path / "anew", adapter_name_or_path=str(folder), num_train_epochs=1)
    assert adapter["train_loss"] != pytest.approx(sum(losses(tmp_path / "whole")[6:]) / 6, abs=1e-6)


def test_train_when_interrupted_saves_and_leaves(tiny_llama: Path, tiny_data: Path, tmp_path: Path) -> None:
    run(tiny_llama, tiny_data, tmp_path / "whole")
    stopped = tmp_path / "stopped"
    _start_and_kill(config(tiny_llama, tiny_data, stopped, save_steps=1000), 4, signal.SIGTERM)
    assert len(list_checkpoints(stopped)) == 1
    assert list_checkpoints(stopped)[0][0] == len(losses(stopped)) < _STEPS
    run(tiny_llama, tiny_data, stopped, resume_from_checkpoint=True, save_steps=1000)
    assert losses(stopped) == losses(tmp_path / "whole")


def test_train_when_folder_holds_a_run_names_the_three_choices(
    tiny_llama: Path, tiny_data: Path, tmp_path: Path
) -> None:
    run(tiny_llama, tiny_data, tmp_path, max_steps=1)
    with pytest.raises(ConfigError, match=r"already holds a run.*resume_from.*overwrite_output_dir.*another"):
        run(tiny_llama, tiny_data, tmp_path, max_steps=1)
    run(tiny_llama, tiny_data, tmp_path, max_steps=2, overwrite_output_dir=True)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [2]


def test_resume_when_newest_is_damaged_names_it_and_the_one_before(
    tiny_llama: Path, tiny_data: Path, tmp_path: Path
) -> None:
    run(tiny_llama, tiny_data, tmp_path, max_steps=6)
    newest = tmp_path / "checkpoint-6" / "optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match=r"checkpoint-6/optimizer\.safetensors.*checkpoint-3"):
        run(tiny_llama, tiny_data, tmp_path, max_steps=6, resume_from_checkpoint=True)


def test_resume_when_batch_size_changed_says_which_setting(tiny_llama: Path, tiny_data: Path, tmp_path: Path) -> None:
    run(tiny_llama, tiny_data, tmp_path, max_steps=3)
    with pytest.raises(CheckpointError, match="samples_per_step: 4 then, 2 now"):
        run(tiny_llama, tiny_data, tmp_path, resume_from_checkpoint=True, per_device_train_batch_size=2)


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_resume_when_the_base_is_another_is_refused_and_one_that_moved_goes_on(
    tuning: str, tiny_llama: Path, tiny_data: Path, tmp_path: Path
) -> None:
    keys = {"finetuning_type": tuning, "learning_rate": 1e-3}
    other, moved, out = save_tiny_model(tmp_path / "other", "llama", seed=7), tmp_path / "moved", tmp_path / "out"
    shutil.copytree(tiny_llama, moved)
    run(tiny_llama, tiny_data, tmp_path / "whole", **keys)
    run(tiny_llama, tiny_data, out, **keys)
    shutil.rmtree(out / "checkpoint-12")
    written = {path.name: path.read_bytes() for path in out.glob("*.json")}
    with pytest.raises(CheckpointError, match=rf"checkpoint-9: was trained on {tiny_llama}, whose weights are not"):
        run(other, tiny_data, out, resume_from_checkpoint=True, **keys)
    assert {path.name: path.read_bytes() for path in out.glob("*.json")} == written
    run(moved, tiny_data, out, resume_from_checkpoint=True, **keys)
    assert _weights(out) == _weights(tmp_path / "whole")


_OTHER_FUNCTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"lora_rank": 16}, "lora_rank: 4 then, 16 now; lora_alpha: 8 then, 32 now"),
    "alpha": ({"lora_alpha": 16}, "lora_alpha: 8 then, 16 now"),
    "rslora": ({"use_rslora": True}, "use_rslora: False then, True now"),
    "dora": ({"use_dora": True}, "use_dora: False then, True now"),
    "target": ({"lora_target": "q_proj"}, "lora_target: 'all' then, 'q_proj' now"),
    "full": ({"finetuning_type": "full"}, "finetuning_type: 'lora' then, 'full' now"),
    "bits": ({"quantization_bit": 4}, "quantization_bit: None then, 4 now"),
    "seed": ({"seed": 1}, "seed: 42 then, 1 now"),
}


def test_resume_when_another_function_would_be_trained_says_which_setting_before_anything_is_loaded(
    tiny_llama: Path, tiny_data: Path, tmp_path: Path
) -> None:
    run(tiny_llama, tiny_data, tmp_path, max_steps=3)
    for changed, told in _OTHER_FUNCTIONS.values():
        with pytest.raises(CheckpointError, match=re.escape(f"another setting ({told}")):
            run(tmp_path / "none", tiny_data, tmp_path, resume_from_checkpoint=True, max_steps=4, **changed)
    how = {"lora_dropout": 0.1, "learning_rate": 1e-3, "bf16": True, "logging_steps": 2, "save_steps": 1}
    run(tiny_llama, tiny_data, tmp_path, resume_from_checkpoint=True, max_steps=4, **how)


def test_interrupted_when_by_sigterm_has_its_exit_code() -> None:
    assert RunInterruptedError("x", signal.SIGTERM).exit_code == 143
