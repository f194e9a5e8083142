"""From files, mappings and words to a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fourfold.base.errors import ConfigError
from fourfold.config.load import load

FIRST_CONFIG: dict[str, Any] = {
    "stage": "sft",
    "do_train": True,
    "model_name_or_path": "unsloth/llama-3-8b-Instruct-bnb-4bit",
    "dataset": "identity,alpaca_en_demo",
    "template": "llama3",
    "finetuning_type": "lora",
    "lora_target": "all",
    "output_dir": "llama3_lora",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "lr_scheduler_type": "cosine",
    "logging_steps": 5,
    "warmup_ratio": 0.1,
    "save_steps": 1000,
    "learning_rate": 5e-05,
    "num_train_epochs": 3.0,
    "max_samples": 500,
    "max_grad_norm": 1.0,
    "loraplus_lr_ratio": 16.0,
    "fp16": True,
    "report_to": "none",
}
"""The first config that a newcomer is shown."""


def problems_of(source: Any, *words: str, **options: Any) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load(source, words, **options)
    return caught.value.problems


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_load_when_first_config_as_json_gives_its_values(tmp_path: Path) -> None:
    run = load(write(tmp_path, "train.json", json.dumps(FIRST_CONFIG)))
    assert run.source == FIRST_CONFIG
    assert run.notes == ()
    assert run.data.dataset == ("identity", "alpaca_en_demo")
    assert run.tuning.lora_target == ("all",)
    assert run.tuning.lora_alpha == 16
    assert run.training.fp16
    assert run.training.learning_rate == 5e-5
    assert run.output.report_to == ()
    assert run.output.save_steps == 1000


def test_load_when_chat_twin_gives_adapter() -> None:
    twin = {name: FIRST_CONFIG[name] for name in ("model_name_or_path", "template", "finetuning_type")}
    run = load({**twin, "adapter_name_or_path": "llama3_lora"}, verb="chat")
    assert run.model.adapter_name_or_path == ("llama3_lora",)


def test_load_when_yaml_reads_numbers_as_yaml_1_2(tmp_path: Path) -> None:
    text = "learning_rate: 5e-05\nadam_epsilon: 1E-8\neval_strategy: no\nseed: 010\nbf16: true\nrun_name: on\n"
    run = load(write(tmp_path, "a.yaml", text))
    assert run.training.learning_rate == 5e-5
    assert run.training.adam_epsilon == 1e-8
    assert run.training.eval_strategy == "no"
    assert run.training.seed == 10
    assert run.output.run_name == "on"


@pytest.mark.parametrize("value", ["a,b", " a , b ", ["a", "b"], ("a", "b")])
def test_load_when_list_given_in_any_form_gives_the_same(value: Any) -> None:
    assert load({"dataset": value}).data.dataset == ("a", "b")


def test_load_when_words_follow_a_file_the_later_wins(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yml", "seed: 1\ncutoff_len: 64\nparallel:\n  tp: 2\n  pp: 2\n")
    run = load(path, ["seed=2", "--cutoff_len", "32", "--cutoff-len=16", "parallel.tp=4"])
    assert (run.training.seed, run.data.cutoff_len, run.parallel.tp, run.parallel.pp) == (2, 16, 4, 2)


def test_load_when_flags_take_the_words_that_are_theirs() -> None:
    words = ["--bf16", "--packing", "false", "--no_plot_loss", "--do_train", "seed=7", "--use_dora"]
    run = load({"plot_loss": True}, words)
    assert run.training.bf16
    assert run.data.packing is False
    assert not run.output.plot_loss
    assert run.training.do_train
    assert run.training.seed == 7
    assert run.tuning.use_dora


def test_load_when_words_hold_text_keeps_it_as_it_is() -> None:
    words = ["run_name=1e5", "default_system=You are: kind", "--hf_hub_token", "007", "model_revision=[x]"]
    run = load({}, words)
    assert run.output.run_name == "1e5"
    assert run.data.default_system == "You are: kind"
    assert run.model.hf_hub_token == "007"
    assert run.model.model_revision == "[x]"


def test_load_when_words_hold_mappings_reads_them() -> None:
    words = ["dataset_vars.name=Ada", "dataset_vars.author=Fourfold", "lr_scheduler_kwargs={min_lr: 1e-6}"]
    run = load({}, words)
    assert run.data.dataset_vars == {"name": "Ada", "author": "Fourfold"}
    assert run.training.lr_scheduler_kwargs == {"min_lr": 1e-6}


def test_load_when_a_mapping_is_given_as_text_reads_it() -> None:
    assert load({"lr_scheduler_kwargs": '{"min_lr": 1e-6}'}).training.lr_scheduler_kwargs == {"min_lr": 1e-6}
    assert load({"lr_scheduler_kwargs": "{min_lr: 1e-6}"}).training.lr_scheduler_kwargs == {"min_lr": 1e-6}
    assert problems_of({"lr_scheduler_kwargs": "[1,"}) == ("lr_scheduler_kwargs: '[1,' is not valid. Use a mapping.",)


def test_load_when_max_steps_is_negative_word_takes_it_as_value() -> None:
    assert load({}, ["--max_steps", "-1"]).training.max_steps == -1


def test_load_when_many_keys_are_wrong_reports_all_at_once() -> None:
    found = problems_of(
        {
            "lora_rnak": 8,
            "learning_rate": "abc",
            "cutoff_len": 0,
            "lora_dropout": True,
            "flash_attn": "fa9",
            "optim": "adamw_troch",
            "quantization_method": "gptq",
            "use_galore": True,
            "fp16": True,
            "bf16": True,
        }
    )
    assert {problem.partition(":")[0] for problem in found} == {
        "lora_rnak", "learning_rate", "cutoff_len", "lora_dropout", "flash_attn", "optim", "quantization_method",
        "use_galore", "bf16",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"lora_rnak": 8}, "lora_rnak: there is no such key. Did you mean lora_rank"),
        ({"lr": 1e-3}, "lr: there is no such key. Did you mean lora_rank or learning_rate"),
        ({"epochs": 3}, "epochs: there is no such key. Did you mean ppo_epochs or num_train_epochs?"),
        ({"cutoff_len": 0}, "cutoff_len: 0 is out of range. Use an integer of at least 1."),
        ({"learning_rate": -1.0}, "learning_rate: -1.0 is out of range. Use a number above 0."),
        ({"learning_rate": "abc"}, "learning_rate: 'abc' is not valid. Use a number above 0."),
        ({"lora_dropout": 1}, "lora_dropout: 1 is out of range. Use a number of at least 0 and below 1."),
        ({"cutoff_len": 1.5}, "cutoff_len: 1.5 is not valid. Use an integer of at least 1."),
        ({"seed": True}, "seed: true is not valid. Use an integer of at least 0 and below 4294967296."),
        ({"learning_rate": float("inf")}, "learning_rate: inf is not valid. Use a number above 0."),
        ({"seed": None}, "seed: null is not valid. Use an integer of at least 0 and below 4294967296."),
        ({"fp16": 3}, "fp16: 3 is not valid. Use true or false."),
        ({"parallel": {"tpp": 2}}, "parallel.tpp: there is no such key. Did you mean parallel.tp"),
        ({"parallel": 2}, "parallel: 2 is not a mapping."),
        ({"stage": "sfft"}, "stage: 'sfft' is not known. Did you mean sft?"),
        ({"template": "lama3"}, "template: 'lama3' is not known. Did you mean llama3"),
        ({"report_to": "wandb,tensorbord"}, "report_to: 'tensorbord' is not known. Did you mean tensorboard?"),
        ({"optim": "galore_adamw"}, "optim: 'galore_adamw' is refused. GaLore is not supported. Use optim"),
        ({"schema_version": 99}, "schema_version: 99 is out of range. Use an integer of at least 1 and at most 1."),
    ],
)
def test_load_when_a_value_is_not_valid_says_what_is(keys: dict[str, Any], expected: str) -> None:
    found = problems_of(keys)
    assert len(found) == 1
    assert found[0].startswith(expected)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.json", '{\n "seed": 1,\n "stage" "sft"\n}', "line 3, column 10: bad JSON"),
        ("a.json", "", "line 1, column 1: bad JSON"),
        ("a.json", '{"seed": 1, "seed": 2}', "'seed' is given twice"),
        ("a.yaml", "seed: 1\nstage: [sft\nbf16: true\n", "line 3, column 5: bad YAML"),
        ("a.yaml", "seed: 1\nbf16: true\nseed: 2\n", "line 3, column 1: bad YAML, 'seed' is given twice"),
        ("a.yaml", "just words", "holds str, not keys"),
        ("a.toml", "seed = 1", "ends in .yaml, .yml or .json"),
    ],
)
def test_load_when_file_is_damaged_names_the_line(tmp_path: Path, name: str, text: str, expected: str) -> None:
    found = problems_of(write(tmp_path, name, text))
    assert len(found) == 1
    assert expected in found[0]


def test_load_when_file_is_missing_names_it(tmp_path: Path) -> None:
    assert "there is no such file" in problems_of(tmp_path / "no.yaml")[0]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("stray", "stray: is neither key=value nor --key value."),
        ("--seed", "seed: has no value."),
    ],
)
def test_load_when_a_word_is_not_a_key_says_so(word: str, expected: str) -> None:
    assert problems_of({}, word)[0].startswith(expected)


def test_load_when_extra_args_are_allowed_notes_what_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALLOW_EXTRA_ARGS", "1")
    run = load({"my_own_key": 1})
    assert len(run.notes) == 1
    assert run.notes[0].startswith("my_own_key: there is no such key.")


def test_load_when_given_its_own_flat_form_gives_the_same_run() -> None:
    keys = {
        **FIRST_CONFIG,
        "template": "auto",
        "warmup_steps": 0.05,
        "global_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "parallel": {"tp": 2, "pp_layers_per_stage": [1, 2]},
        "dataset_vars": {"name": "x"},
        "eval_strategy": "steps",
        "val_size": 0.1,
        "hf_hub_token": "secret",
        "lora_target": ["q_proj", "v_proj"],
    }
    run = load(keys)
    flat = json.loads(json.dumps(run.flat()))
    again = load(flat)
    assert "secret" not in json.dumps(flat)
    assert again.flat() == run.flat()
    assert (again.training, again.data, again.parallel) == (run.training, run.data, run.parallel)


@pytest.mark.parametrize(
    ("keys", "name", "expected"),
    [
        ({"lora_rank": 4}, "lora_alpha", 8),
        ({"lora_rank": 4, "lora_alpha": 4}, "lora_alpha", 4),
        ({"neat_packing": True}, "packing", True),
        ({}, "packing", None),
        ({"disable_gradient_checkpointing": True}, "gradient_checkpointing", False),
        ({"memory": "low"}, "micro_batch_tokens", 1024),
        ({"memory": "low", "micro_batch_tokens": 300}, "micro_batch_tokens", 300),
        ({"eval_strategy": "steps", "logging_steps": 7}, "eval_steps", 7),
        ({"eval_strategy": "epoch"}, "do_eval", True),
        ({}, "do_train", True),
        ({"do_eval": True}, "do_train", False),
        ({"warmup_steps": 0.25}, "warmup_ratio", 0.25),
        ({"resume_from_checkpoint": False}, "resume_from_checkpoint", None),
        ({"resume_from_checkpoint": "true"}, "resume_from_checkpoint", True),
        ({"report_to": "none"}, "report_to", []),
        ({"report_to": None}, "report_to", []),
        ({"use_swanlab": True}, "report_to", ["swanlab"]),
    ],
)
def test_load_when_a_default_depends_on_other_keys_fills_it(keys: dict[str, Any], name: str, expected: Any) -> None:
    assert load(keys).flat()[name] == expected


def test_load_when_memory_is_low_recomputes_unless_told_not_to() -> None:
    assert load({"memory": "low"}).parallel.recompute == "full"
    assert load({"memory": "low", "parallel": {"recompute": "selective"}}).parallel.recompute == "selective"
    assert load({"memory": "low", "gradient_checkpointing": False}).parallel.recompute == "auto"
    assert load({}).parallel.recompute == "auto"


def test_flat_when_asked_for_secrets_has_them() -> None:
    run = load({"hf_hub_token": "abc"})
    assert "hf_hub_token" not in run.flat()
    assert run.flat(secrets=True)["hf_hub_token"] == "abc"


def test_load_when_a_later_key_is_given_notes_it() -> None:
    assert load({"vllm_gpu_util": 0.5}).notes == (
        "vllm_gpu_util: 0.5 is accepted but without effect yet; it comes with vLLM",
    )


def test_load_when_a_list_has_empty_parts_leaves_them_out() -> None:
    assert load({}, ["dataset="]).data.dataset == ()
    assert load({}, ["dataset=a,,b,"]).data.dataset == ("a", "b")


def test_load_when_a_path_begins_with_the_home_folder_expands_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    keys = {"model_name_or_path": "~/m", "adapter_name_or_path": "~/a,b/c", "dataset_dir": "~/d", "output_dir": "~/o"}
    run = load(keys)
    assert (run.model.model_name_or_path, run.data.dataset_dir) == ("/home/someone/m", "/home/someone/d")
    assert run.model.adapter_name_or_path == ("/home/someone/a", "b/c")
    assert run.output.output_dir == "/home/someone/o"


def test_load_when_a_template_is_unknown_says_what_takes_the_models_own() -> None:
    with pytest.raises(ConfigError, match=r"template: 'gemma4' is not known\. template: auto takes the model's own"):
        load({"template": "gemma4"})
    with pytest.raises(ConfigError, match=r"template: 'lama3' is not known\. Did you mean llama3"):
        load({"template": "lama3"})
