"""Training through the command on a tiny model: each run combines several settings and is checked for all of them."""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from command import Train, refusal, run_here
from fourfold.checkpoint.folder import list_checkpoints


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def log_rows(out: Path, key: str) -> list[tuple[int, float]]:
    """Step and value of every row of trainer_log.jsonl that has a key."""
    rows = map(json.loads, (out / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines())
    return [(row["current_steps"], row[key]) for row in rows if key in row]


def steps_saved(out: Path) -> list[int]:
    return [step for step, _ in list_checkpoints(out)]


# --- stages and kinds of tuning --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["sft", "pt"])
@pytest.mark.parametrize(
    ("tuning", "file"),
    [
        ("finetuning_type=full bf16=true", "model.safetensors"),
        ("finetuning_type=freeze freeze_trainable_layers=1", "model.safetensors"),
        ("finetuning_type=lora neftune_noise_alpha=5 lora_dropout=0.1", "adapter_model.safetensors"),
        ("quantization_bit=4 bf16=true", "adapter_model.safetensors"),
    ],
    ids=["full", "freeze", "lora", "qlora"],
)
def test_train_when_any_tuning_meets_any_stage_learns_and_saves(
    train: Train, out: Path, stage: str, tuning: str, file: str
) -> None:
    data = "dataset=tiny" if stage == "sft" else "dataset=tiny_text"
    done = train(f"stage={stage}", data, "cutoff_len=32", "max_steps=12", "max_grad_norm=0.5", *tuning.split())
    assert (out / file).exists()
    values = [loss for _, loss in log_rows(out, "loss")]
    assert len(values) == 12
    assert sum(values[-3:]) < sum(values[:3])
    where = "model_name_or_path" if file.startswith("model") else "adapter_name_or_path"
    assert f"{where}={out}" in done.err.splitlines()[-1]


def test_train_when_full_writes_a_model_that_loads_and_differs(train: Train, out: Path, tiny_llama: Path) -> None:
    train("finetuning_type=full", "lr_scheduler_type=constant", "warmup_ratio=0", "pure_bf16=true")
    trained, base = (AutoModelForCausalLM.from_pretrained(path) for path in (out, tiny_llama))
    assert str(trained.dtype) == "torch.bfloat16"
    assert (trained.lm_head.weight.float() - base.lm_head.weight).abs().max() > 1e-3


# --- files of a run --------------------------------------------------------------------------------------------------


def test_train_when_done_leaves_the_files_that_users_expect(train: Train, out: Path) -> None:
    done = train("max_steps=4", "plot_loss=true", "include_num_input_tokens_seen=true", "logging_steps=2")
    results = read(out / "train_results.json")
    assert results == read(out / "all_results.json")
    assert sorted(results) == [
        "epoch", "num_input_tokens_seen", "peak_memory_gib", "total_flos", "train_loss", "train_runtime",
        "train_samples_per_second", "train_steps_per_second",
    ]  # fmt: skip
    state = read(out / "trainer_state.json")
    assert (state["global_step"], state["max_steps"], state["num_input_tokens_seen"]) == (
        4,
        4,
        results["num_input_tokens_seen"],
    )
    assert [row["step"] for row in state["log_history"]] == [2, 4]
    assert sorted(state["log_history"][0]) == ["epoch", "grad_norm", "learning_rate", "loss", "num_tokens", "step"]
    # 6 operations for each token and parameter outside the embeddings: 40,096 and the adapter's, less 384 x 32
    assert state["total_flos"] == results["total_flos"]
    parameters = results["total_flos"] / 6 / results["num_input_tokens_seen"]
    assert parameters == pytest.approx(40_096 - 384 * 32 + 3_712, rel=1e-6)
    assert (out / "training_loss.png").read_bytes().startswith(b"\x89PNG")
    assert read(out / "versions.json")["fourfold"]
    assert sorted(read(out / "datasets.json")["datasets"]) == ["train"]
    assert "max_steps: 4" in (out / "fourfold_config.yaml").read_text(encoding="utf-8")
    assert "***** train metrics *****" in done.err


def test_train_when_shorter_than_logging_steps_shows_a_loss(train: Train, out: Path) -> None:
    train("max_steps=3", "logging_steps=500")
    assert [step for step, _ in log_rows(out, "loss")] == [3]


def test_train_when_the_config_is_written_back_runs_again(
    train: Train, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train("max_steps=2")
    written = out / "fourfold_config.yaml"
    done = run_here(capsys, "train", written, f"output_dir={tmp_path / 'again'}")
    assert done.code == 0, done.err
    assert log_rows(tmp_path / "again", "loss") == log_rows(out, "loss")


# --- evaluation ------------------------------------------------------------------------------------------------------


def test_train_when_evaluated_by_steps_ends_with_the_best(train: Train, out: Path) -> None:
    # a rate that ruins the model soon, so that the best evaluation is not the last
    done = train(
        *("max_steps=12", "val_size=4", "eval_strategy=steps", "eval_steps=1", "save_steps=1", "save_total_limit=2"),
        *("learning_rate=3", "lr_scheduler_type=constant", "warmup_ratio=0", "optim=sgd"),
        *("early_stopping_steps=2", "load_best_model_at_end=true", "compute_accuracy=true"),
    )
    losses = dict(log_rows(out, "eval_loss"))
    state = read(out / "trainer_state.json")
    best = min(losses, key=losses.__getitem__)
    assert 1 <= best < max(losses) < 12
    assert max(losses) == best + 2  # two evaluations without a better one
    assert (state["best_global_step"], state["best_metric"]) == (best, losses[best])
    assert state["best_model_checkpoint"] == f"checkpoint-{best}"
    assert steps_saved(out) == [best, max(losses)]
    assert f"Loaded the best weights, of step {best}" in done.err
    results = read(out / "eval_results.json")
    assert results["eval_loss"] == pytest.approx(losses[best], abs=1e-6)
    assert 0 <= results["eval_accuracy"] <= 1
    assert read(out / "all_results.json").items() >= results.items()


def test_train_when_evaluated_by_epoch_saves_the_best_only(train: Train, out: Path) -> None:
    train(
        *("max_steps=-1", "num_train_epochs=2", "eval_dataset=tiny,tiny", "eval_strategy=epoch"),
        *("save_strategy=best", "finetuning_type=full", "learning_rate=1e-3", "report_to=tensorboard"),
    )
    losses = log_rows(out, "eval_loss")
    assert [step for step, _ in losses] == [6, 12]
    assert steps_saved(out) == [6, 12]  # each was better than the one before
    assert list((out / "runs").rglob("events.out.tfevents.*"))


def test_train_when_sets_are_evaluated_apart_reports_each(train: Train, out: Path) -> None:
    train(
        *("max_steps=2", "stage=pt", "packing=false", "dataset=tiny_text", "eval_dataset=tiny_text,tiny"),
        *("eval_on_each_dataset=true", "eval_strategy=steps", "eval_steps=2", "eval_on_start=true"),
        "metric_for_best_model=tiny_loss",
    )
    assert [step for step, _ in log_rows(out, "eval_tiny_loss")] == [0, 2]
    results = read(out / "eval_results.json")
    assert {"eval_tiny_loss", "eval_tiny_text_loss"} <= set(results)
    assert read(out / "trainer_state.json")["best_metric"] == pytest.approx(results["eval_tiny_loss"], abs=1e-6)


def test_evaluate_and_predict_when_nothing_is_trained_use_the_adapter(train: Train, out: Path, tmp_path: Path) -> None:
    train("max_steps=6")
    asked = (f"adapter_name_or_path={out}", "do_train=false", "dataset=", "eval_dataset=tiny", "max_samples=5")
    train(*asked, "do_eval=true", f"output_dir={tmp_path / 'eval'}")
    train("do_train=false", "do_eval=true", "dataset=", *asked[3:], f"output_dir={tmp_path / 'base'}")
    tuned, base = (read(tmp_path / name / "eval_results.json")["eval_loss"] for name in ("eval", "base"))
    assert tuned < base
    assert not (tmp_path / "eval" / "train_results.json").exists()
    assert steps_saved(tmp_path / "eval") == []
    predicted = tmp_path / "predict"
    train(*asked, "do_predict=true", "predict_with_generate=true", "max_new_tokens=4", f"output_dir={predicted}")
    lines = [json.loads(line) for line in (predicted / "generated_predictions.jsonl").read_text("utf-8").splitlines()]
    assert [sorted(line) for line in lines] == [["label", "predict", "prompt"]] * 5
    assert lines[0]["label"].strip() == "the red tree."
    assert lines[0]["prompt"].endswith("<|im_start|>assistant\n")
    results = read(predicted / "predict_results.json")
    assert results["predict_loss"] == pytest.approx(tuned, abs=1e-6)
    assert results == read(predicted / "all_results.json")
    assert {"predict_bleu-4", "predict_rouge-1", "predict_rouge-2", "predict_rouge-l"} <= set(results)


def test_evaluate_when_answers_are_generated_tells_how_alike_they_are(train: Train, out: Path) -> None:
    sets = ("eval_dataset=tiny", "eval_on_each_dataset=true", "max_samples=2", "dataset=", "do_train=false")
    done = train(*sets, "do_eval=true", "predict_with_generate=true", "max_new_tokens=4")
    results = read(out / "eval_results.json")
    assert {f"eval_tiny_{key}" for key in ("loss", "bleu-4", "rouge-1", "rouge-2", "rouge-l")} <= set(results)
    assert "2 predictions written to" in done.err


def test_predict_when_data_is_shaped_otherwise_answers_every_row(train: Train, tmp_path: Path) -> None:
    asked = ("eval_dataset=tiny", "dataset=", "do_train=false", "do_predict=true", "predict_with_generate=true")
    lines: dict[str, list[dict[str, str]]] = {}
    shapes = {"packed": ["packing=true"], "prompts": ["train_on_prompt=true"], "shown": ["skip_special_tokens=false"]}
    for name, keys in {"plain": [], **shapes}.items():
        out = tmp_path / name
        train(*asked, *keys, "max_new_tokens=2", "do_sample=false", f"output_dir={out}")
        text = (out / "generated_predictions.jsonl").read_text("utf-8")
        lines[name] = [json.loads(line) for line in text.splitlines()]
    assert len(lines["plain"]) == 22
    assert lines["packed"] == lines["prompts"] == lines["plain"]
    shown = [line["label"] for line in lines["shown"]]
    assert [label.replace("<|im_end|>", "") for label in shown] == [line["label"] for line in lines["plain"]]
    assert "<|im_end|>" in shown[0]


# --- saving ----------------------------------------------------------------------------------------------------------


def test_train_when_only_the_model_is_saved_cannot_be_resumed(
    train: Train, words: list[str], out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train("max_steps=4", "save_steps=1", "save_only_model=true", "save_total_limit=1")
    assert steps_saved(out) == [4]
    assert not list(out.rglob("optimizer*"))
    line = refusal(run_here(capsys, "train", *words, "max_steps=6", "resume_from_checkpoint=true"))
    assert line.startswith(f"{out / 'checkpoint-4'}: was saved with save_only_model, so it has no optimizer state")


@pytest.mark.parametrize(("strategy", "steps"), [("no", [5]), ("epoch", [3, 5]), ("steps", [2, 4, 5])])
def test_train_when_any_strategy_always_saves_the_last_step(
    train: Train, out: Path, strategy: str, steps: list[int]
) -> None:
    train("max_steps=5", f"save_strategy={strategy}", "save_steps=2", "global_batch_size=8")
    assert steps_saved(out) == steps


def test_resume_when_rate_and_length_are_changed_follows_the_new_schedule(train: Train, out: Path) -> None:
    train("max_steps=2", "lr_scheduler_type=linear", "warmup_ratio=0", "learning_rate=1e-3")
    train(
        *("max_steps=4", "lr_scheduler_type=linear", "warmup_ratio=0", "learning_rate=2e-3"),
        "resume_from_checkpoint=true",
    )
    assert [rate for _, rate in log_rows(out, "lr")] == pytest.approx([1e-3, 5e-4, 1e-3, 5e-4])


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_train_when_done_lets_others_read_what_is_saved(train: Train, out: Path, tuning: str) -> None:
    before = os.umask(0o022)
    try:
        train(f"finetuning_type={tuning}", "max_steps=1")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in out.rglob("*") if path.is_file()}
    assert len([name for name in modes if name.endswith("model.safetensors")]) == 1
    assert set(modes.values()) == {0o644}, modes


# --- streams and packs -----------------------------------------------------------------------------------------------


def test_stream_when_resumed_equals_the_stream_in_one_go(train: Train, out: Path, tmp_path: Path) -> None:
    streamed = ("streaming=true", "buffer_size=8", "preprocessing_batch_size=5", "lr_scheduler_type=constant")
    train(*streamed, "max_steps=9", "val_size=4", "do_eval=true")
    assert len(log_rows(out, "loss")) == 9  # the 18 rows that are left make four steps and a half an epoch
    assert (
        "Num examples = not known, streamed"
        in train(*streamed, "max_steps=4", "val_size=4", "do_eval=true", f"output_dir={tmp_path / 'part'}").err
    )
    train(
        *streamed, "max_steps=9", "val_size=4", "do_eval=true", f"output_dir={tmp_path / 'part'}",
        "resume_from_checkpoint=true",
    )  # fmt: skip
    assert log_rows(tmp_path / "part", "loss") == log_rows(out, "loss")
    assert (tmp_path / "part" / "eval_results.json").exists()


def test_stream_when_its_order_would_change_cannot_be_resumed(
    train: Train, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    train("streaming=true", "max_steps=1")
    resumed = ("streaming=true", "max_steps=2", "resume_from_checkpoint=true", "buffer_size=4")
    assert "cannot be resumed with another setting (data: " in refusal(run_here(capsys, "train", *words, *resumed))


@pytest.mark.parametrize("packing", ["packing=true", "neat_packing=true"])
def test_pack_when_all_rows_are_in_one_step_has_the_loss_of_single_rows(
    train: Train, out: Path, tmp_path: Path, packing: str
) -> None:
    whole = ("per_device_train_batch_size=22", "cutoff_len=200")
    train(*whole, f"output_dir={tmp_path / 'single'}")
    done = train(*whole, packing)
    packed, single = (log_rows(folder, "loss")[0][1] for folder in (out, tmp_path / "single"))
    assert packed == pytest.approx(single, abs=1e-5)
    examples = next(line for line in done.err.splitlines() if "Num examples" in line)
    assert int(examples.split("=")[1]) < 22


# --- optimizers, schedules, trackers ---------------------------------------------------------------------------------

_OPTIMIZERS = {
    "adamw_torch": "learning_rate=1e-2 weight_decay=0.1 adam_beta2=0.99",
    "adamw_8bit": "learning_rate=1e-2 optim_args=min_8bit_size=128",
    "adafactor": "learning_rate=1e-2",
    "muon": "learning_rate=1e-2 finetuning_type=full",
    "sgd": "learning_rate=1 optim_args=momentum=0.9,nesterov=true",
}


@pytest.mark.parametrize("optim", sorted(_OPTIMIZERS))
def test_train_when_any_optimizer_is_named_learns(train: Train, out: Path, optim: str) -> None:
    if optim == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    train(f"optim={optim}", "max_steps=10", "gradient_accumulation_steps=2", *_OPTIMIZERS[optim].split())
    values = [loss for _, loss in log_rows(out, "loss")]
    assert sum(values[-3:]) < sum(values[:3])


_SCHEDULES = {
    "cosine_with_restarts": {"num_cycles": 2},
    "polynomial": {"power": 2.0},
    "inverse_sqrt": {"timescale": 3},
    "cosine_with_min_lr": {"min_lr": 1e-3},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1, "warmup_lr_rate": 0.5},
    "warmup_stable_decay": {"num_decay_steps": 2},
    "reduce_lr_on_plateau": {"patience": 0, "mode": "max"},
    "greedy": {"patience": 0, "min_lr": 0.0, "mode": "max", "factor": 0.5},
}


@pytest.mark.parametrize(
    "kind",
    [
        *("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"),
        *("reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay", "greedy"),
    ],
)
def test_train_when_any_schedule_is_named_moves_the_rate(train: Train, out: Path, kind: str) -> None:
    settings = json.dumps(_SCHEDULES[kind]) if kind in _SCHEDULES else "{}"
    train(
        *(f"lr_scheduler_type={kind}", f"lr_scheduler_kwargs={settings}", "max_steps=6", "warmup_steps=2"),
        *("val_size=2", "eval_strategy=steps", "eval_steps=1", "learning_rate=1e-2"),
    )
    rates = [rate for _, rate in log_rows(out, "lr")]
    assert len(rates) == 6
    assert all(math.isfinite(rate) and 0 <= rate <= 2e-2 for rate in rates)
    assert (len(set(rates)) == 1) is (kind == "constant")


def test_train_when_reported_to_wandb_works_offline(
    train: Train, out: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train("report_to=tensorboard,wandb", "run_name=offline", "max_steps=2", "logging_first_step=true")
    assert len(list((out / "wandb").glob("offline-run-*"))) == 1
    assert list((out / "runs").rglob("events.out.tfevents.*"))


def test_train_when_memory_is_to_be_saved_recomputes_with_the_same_loss(
    train: Train, out: Path, tmp_path: Path
) -> None:
    keys = ("max_steps=2", "full_determinism=true", "disable_shuffling=true", "micro_batch_tokens=64")
    train(*keys, "gradient_checkpointing=true")
    train(*keys, f"output_dir={tmp_path / 'kept'}")
    assert log_rows(out, "loss") == log_rows(tmp_path / "kept", "loss")


def test_train_when_the_loss_is_lost_says_so_once(train: Train) -> None:
    err = train("max_steps=4", "learning_rate=1e30", "optim=sgd", "max_grad_norm=0", "lr_scheduler_type=constant").err
    assert err.count("warning: loss: is nan at step 2. Lower learning_rate, or look at the data.") == 1
    assert err.count("warning: ") == 1


def test_train_when_samples_outgrow_the_context_says_so(train: Train, tmp_path: Path) -> None:
    (tmp_path / "long.json").write_text(json.dumps([{"instruction": "Say it", "output": "y " * 200}]), encoding="utf-8")
    entries = {"long": {"file_name": str(tmp_path / "long.json")}}
    done = train(f"dataset_dir={json.dumps(entries)}", "dataset=long", "cutoff_len=300", "strategy=fsdp", "nproc=1")
    assert "cutoff_len: the longest sample has 300 tokens, but the model has 256 positions." in done.err
    assert "strategy: fsdp splits nothing, since there is one process." in done.err


def test_resume_when_all_is_done_says_what_to_raise(train: Train) -> None:
    train()
    assert "Nothing is left to train" in train("resume_from_checkpoint=true").err


def test_train_when_a_setting_has_no_effect_on_this_model_says_so(train: Train) -> None:
    err = train("moe_aux_loss_coef=0.1", "enable_liger_kernel=true").err
    assert "warning: moe_aux_loss_coef: this llama model has no experts to balance, so it has no effect." in err
    assert "warning: enable_liger_kernel: " in err
