"""What a user gets wrong is told in one clear line: the key, what is wrong with it, what to do; exit code 2."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from command import Refuse, refusal, run_here, run_light
from tiny_models import save_tiny_model
from training_runs import run

# --- before anything heavy is imported -------------------------------------------------------------------------------


def test_output_folder_when_it_holds_a_run_is_told_with_all_else_before_anything_heavy(
    words: list[str], tmp_path: Path
) -> None:
    (tmp_path / "used" / "checkpoint-3").mkdir(parents=True)
    done = run_light("train", *words, f"output_dir={tmp_path / 'used'}", "dataset=tini")
    assert done.code == 2
    [data, folder] = done.err.splitlines()
    assert data.startswith("dataset: 'tini' is not known")
    assert folder.startswith(f"output_dir: {tmp_path / 'used'} already holds a run.")


@pytest.mark.parametrize(
    ("added", "expected"),
    [
        (["cutof_len=8"], "cutof_len: there is no such key. Did you mean cutoff_len?"),
        (["cutoff_len=0"], "cutoff_len: 0 is out of range. Use an integer of at least 1."),
        (["stage=sfft"], "stage: 'sfft' is not known. Did you mean sft?"),
        (["dataset=tinny"], "dataset: 'tinny' is not known. Did you mean tiny?"),
        (["dataset_dir=/no/such"], "dataset_dir: there is no folder '/no/such'."),
        (["model_name_or_path=/no/such"], "model_name_or_path: there is no folder /no/such. Give a path that exists."),
        (["adapter_name_or_path=/no/such"], "adapter_name_or_path: there is no folder /no/such."),
        (["fp16=true"], "fp16: true needs a GPU"),
    ],
    ids=lambda value: value[0].partition("=")[0] if isinstance(value, list) else "",
)
def test_train_when_the_config_is_wrong_is_refused_before_heavy_imports(
    words: list[str], added: list[str], expected: str
) -> None:
    done = run_light("train", *words, *added)
    assert "imported:" not in done.err
    assert refusal(done).startswith(expected)
    assert done.err.count("\n") == 1


def test_train_when_the_config_file_is_wrong_is_refused_before_heavy_imports(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("stage: sft\ndataset: [a, b\nseed: 1\n", encoding="utf-8")
    done = run_light("train", tmp_path / "bad.yaml")
    assert "imported:" not in done.err
    assert refusal(done).startswith(f"{tmp_path / 'bad.yaml'}, line 3, column 5: bad YAML")


def test_train_when_a_model_is_given_as_the_file_says_how_to_give_it(tiny_llama: Path) -> None:
    done = run_light("train", tiny_llama)
    assert refusal(done).endswith(f"is a model, not a config file. Give it as model_name_or_path={tiny_llama}.")


# --- keys and their values -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("added", "expected"),
    [
        ("lerning_rate=1", "lerning_rate: there is no such key. Did you mean learning_rate"),
        ("parallel.tpp=2", "parallel.tpp: there is no such key. Did you mean parallel.tp or"),
        ("qwertyuiop=1", "qwertyuiop: there is no such key. `fourfold help` lists the keys."),
        # wrong type
        ("do_train=maybe", "do_train: 'maybe' is not valid. Use true or false."),
        ("cutoff_len=12.5", "cutoff_len: 12.5 is not valid. Use an integer of at least 1."),
        ("cutoff_len=true", "cutoff_len: true is not valid. Use an integer of at least 1."),
        ("learning_rate=fast", "learning_rate: 'fast' is not valid. Use a number above 0."),
        ("seed=[1]", "seed: '1' is not valid. Use an integer of at least 0 and below"),
        ("dataset_vars=5", "dataset_vars: 5 is not valid. Use a mapping."),
        # out of range
        ("learning_rate=-1", "learning_rate: -1 is out of range. Use a number above 0."),
        ("learning_rate=0", "learning_rate: 0 is out of range. Use a number above 0."),
        ("per_device_train_batch_size=0", "per_device_train_batch_size: 0 is out of range. Use an integer of at"),
        ("num_train_epochs=-3", "num_train_epochs: -3 is out of range. Use a number above 0."),
        ("warmup_ratio=1.5", "warmup_ratio: 1.5 is out of range. Use a number of at least 0 and at most 1."),
        ("lora_dropout=1", "lora_dropout: 1 is out of range. Use a number of at least 0 and below 1."),
        ("lora_rank=0", "lora_rank: 0 is out of range. Use an integer of at least 1."),
        ("seed=99999999999", "seed: 99999999999 is out of range. Use an integer of at least 0 and below 4294967296."),
        ("output_dir=", "output_dir: is not given. Give a folder for the adapter or model, checkpoints and logs."),
        ("model_name_or_path=", "model_name_or_path: is not given. Give a hub id, a folder or a .gguf file."),
        ("save_total_limit=0", "save_total_limit: 0 is out of range. Use an integer of at least 1 or null."),
        # names from a list
        ("template=smolm2", "template: 'smolm2' is not known. Did you mean smollm2"),
        ("optim=adamm_torch", "optim: 'adamm_torch' is not known. Did you mean adamw_torch"),
        ("optim=galore_adamw", "optim: 'galore_adamw' is refused. GaLore is not supported. Use optim: adamw_8bit"),
        ("lr_scheduler_type=cosin", "lr_scheduler_type: 'cosin' is not known. Did you mean cosine?"),
        ("finetuning_type=loraa", "finetuning_type: 'loraa' is not known. Did you mean lora?"),
        ("report_to=wnadb", "report_to: 'wnadb' is not known. Did you mean wandb?"),
        ("quantization_bit=5", "quantization_bit: '5' is not known. Use one of: 4, 8."),
        ("use_galore=true", "use_galore: true is refused. GaLore is not supported. Use"),
        # files
        ("deepspeed=/no/ds.json", "deepspeed: /no/ds.json cannot be read (No such file or directory). Check"),
        ("resume_from_checkpoint=/no/such", "resume_from_checkpoint: /no/such does not exist. Checkpoints of this"),
        ("output_dir=/proc/out", "output_dir: /proc/out cannot be made (No such file or directory). Name another"),
        ("=3", "=3: names no key. Write key=value"),
        ("--=3", "--=3: names no key. Write key=value"),
        ("stray", "stray: is neither key=value nor --key value."),
        ("--seed", "seed: has no value. Write --seed VALUE or seed=VALUE."),
    ],
    ids=lambda text: text.partition(":")[0] if "=" not in text else text[:30],
)
def test_train_when_a_value_is_wrong_says_what_to_use(refuse: Refuse, added: str, expected: str) -> None:
    assert refuse(added).startswith(expected)


@pytest.mark.parametrize(
    ("added", "listed"),
    [
        ("template=nothing", ["llama3", "qwen3", "smollm2", "auto"]),
        ("stage=nothing", ["pt", "sft", "dpo"]),
        ("optim=nothing", ["adafactor", "adamw_8bit", "adamw_torch", "muon", "sgd"]),
        ("dataset=nothing", ["tiny", "tiny_text"]),
        ("lr_scheduler_type=nothing", ["cosine", "linear", "constant"]),
    ],
)
def test_train_when_a_name_is_unknown_lists_the_valid_ones(refuse: Refuse, added: str, listed: list[str]) -> None:
    names = refuse(added).partition("Use one of: ")[2].rstrip(".").split(", ")
    assert [name for name in listed if name not in names] == []


@pytest.mark.parametrize(
    ("added", "expected"),
    [
        (["val_size=0.1", "eval_dataset=tiny"], "val_size: 0.1 and eval_dataset: tiny contradict each other. Keep one"),
        (["mask_history=true", "train_on_prompt=true"], "mask_history: true and train_on_prompt: true contradict"),
        (["neat_packing=true", "packing=false"], "neat_packing: true packs, but packing is false. Remove one"),
        (["quantization_bit=4", "finetuning_type=full"], "quantization_bit: 4 works with finetuning_type: lora only"),
        (["resume_from_checkpoint=true", "overwrite_output_dir=true"], "overwrite_output_dir: true deletes what"),
        (["streaming=true", "max_samples=3"], "max_samples: 3 does not work with streaming: true. Remove one"),
        (["early_stopping_steps=2"], "early_stopping_steps: needs evaluation while training, but eval_strategy is no."),
        (["fp16=true", "use_cpu=true"], "fp16: true needs a GPU, but use_cpu is true. Use fp16: false to compute in"),
        (["do_train=false"], "do_train: is false, and neither do_eval nor do_predict is true. Set the one that is"),
        (["do_predict=true"], "do_predict: true needs data to evaluate on. Give eval_dataset, or val_size"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, list) else "",
)
def test_train_when_two_keys_contradict_names_both(refuse: Refuse, added: list[str], expected: str) -> None:
    assert refuse(*added).startswith(expected)


def test_train_when_several_keys_are_wrong_tells_all_at_once(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    done = run_here(capsys, "train", *words, "cutoff_len=0", "tempate=auto", "fp16=true")
    assert [line.partition(":")[0] for line in done.err.splitlines()] == ["tempate", "cutoff_len", "fp16"]


# --- config files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.json", '{"stage": "sft",\n "do_train": tru}', ", line 2, column 14: bad JSON, Expecting value: "),
        ("a.json", "", ", line 1, column 1: bad JSON, Expecting value"),
        ("a.json", '{"seed": 1, "seed": 2}', ": 'seed' is given twice. Correct the file."),
        ("a.json", "[1]", ": holds list, not keys. Write lines of the form `key: value`."),
        ("a.yaml", "stage: sft\n  seed: 1\n", ", line 2, column 7: bad YAML, mapping values are not allowed here."),
        ("a.yml", "seed: 1\nseed: 2\n", ", line 2, column 1: bad YAML, 'seed' is given twice. Correct this line."),
        ("a.toml", "seed = 1", ": a config file ends in .yaml, .yml or .json. Rename it, or give keys as key=value."),
        ("gone.yaml", None, ": there is no such file. Check the path"),
    ],
)
def test_train_when_the_config_file_is_bad_names_the_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str | None, expected: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert refusal(run_here(capsys, "train", tmp_path / name)).startswith(f"{tmp_path / name}{expected}")


# --- models and adapters ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("added", "expected"),
    [
        (
            "lora_target=all,q_proj",
            "lora_target: all takes every linear layer, so q_proj adds nothing. Keep one of the",
        ),
        ("lora_target=qq_proj", "lora_target: qq_proj matches nothing in this llama model. Did you mean"),
        (
            "additional_target=nothing",
            "additional_target: nothing matches nothing in this llama model. Use one or more",
        ),
        ("template=llama3 cutoff_len=1", "dataset: none of the 22 rows of tiny can be trained"),
        ("optim=sgd optim_args=speed=1", "optim_args: sgd does not take it"),
        ("lr_scheduler_kwargs={power: 2}", "lr_scheduler_kwargs: {'power': 2} does not go with lr_scheduler_type: cos"),
        ("report_to=swanlab", "report_to: swanlab needs the package swanlab, which is not installed."),
        (
            "finetuning_type=freeze freeze_trainable_layers=9",
            "freeze_trainable_layers: 9 exceeds the model's 2 layers.",
        ),
    ],
    ids=lambda text: text.partition("=")[0] if "=" in text else "",
)
def test_train_when_the_model_or_the_machine_cannot_says_so(refuse: Refuse, added: str, expected: str) -> None:
    if "swanlab" in added and importlib.util.find_spec("swanlab") is not None:
        pytest.skip("swanlab is installed")
    parts = [added] if added.startswith("lr_") else added.split()
    assert refuse(*parts).startswith(expected)


def test_train_when_lora_target_matches_nothing_lists_the_kinds(refuse: Refuse) -> None:
    kinds = refuse("lora_target=nothing").partition("Use one or more of: ")[2]
    assert kinds == "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj."


def test_train_when_the_model_is_something_else_says_so(refuse: Refuse, tiny_data: Path, tmp_path: Path) -> None:
    line = refuse(f"model_name_or_path={tiny_data / 'tiny.json'}")
    assert line.startswith(f"model_name_or_path: {tiny_data / 'tiny.json'} is a file, but not a .gguf file. Give the")
    line = refuse(f"model_name_or_path={tiny_data}")
    assert line.startswith(f"model_name_or_path: {tiny_data} holds no config.json. Give the folder that does")
    (tmp_path / "bad.gguf").write_bytes(b"none")
    assert refuse(f"model_name_or_path={tmp_path / 'bad.gguf'}").startswith("model_name_or_path: ")


def test_train_when_a_model_file_is_damaged_says_so(refuse: Refuse, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    assert refuse(f"model_name_or_path={folder}").startswith(f"model_name_or_path: the model of {folder} cannot be")


@pytest.fixture(scope="module")
def adapter(tiny_llama: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the tiny llama."""
    folder = tmp_path_factory.mktemp("adapter")
    run(tiny_llama, tiny_data, folder, max_steps=1)
    return folder


@pytest.mark.parametrize("verb", ["train", "chat", "export"])
def test_adapter_when_of_another_base_is_refused_by_every_verb(
    verb: str, words: list[str], adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = save_tiny_model(tmp_path / "other", seed=1)
    added = [f"model_name_or_path={other}", f"adapter_name_or_path={adapter}", f"export_dir={tmp_path / 'export'}"]
    line = refusal(run_here(capsys, verb, *words, *added))
    assert line.startswith(f"adapter_name_or_path: {adapter} was trained on ")
    assert f"whose weights are not those of {other}. Set model_name_or_path to that model" in line
    assert not (tmp_path / "export").exists()


def test_train_when_the_template_is_of_another_model_says_what_to_do(refuse: Refuse, tmp_path: Path) -> None:
    # an embedding without spare rows, as most models have
    folder = save_tiny_model(tmp_path / "model", vocab_size=358)
    line = refuse(f"model_name_or_path={folder}", "template=llama3")
    assert line.startswith("template: needs the token <|eot_id|>, but this model's embedding has no row for it (358")


def test_train_when_a_target_is_wrong_keeps_the_run_that_was_to_be_overwritten(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_here(capsys, "train", *words).code == 0
    refusal(run_here(capsys, "train", *words, "overwrite_output_dir=true", "lora_target=nothing"))
    assert (tmp_path / "out" / "checkpoint-1" / "manifest.json").exists()
    assert refusal(run_here(capsys, "train", *words)).startswith(f"output_dir: {tmp_path / 'out'} already holds a run.")


def test_train_when_a_start_failed_the_next_is_not_refused(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    refusal(run_here(capsys, "train", *words, "optim=sgd", "optim_args=speed=1"))
    assert run_here(capsys, "train", *words).code == 0


def test_train_when_the_metric_does_not_exist_names_those_there_are(refuse: Refuse) -> None:
    evaluated = ("val_size=4", "eval_strategy=steps", "eval_steps=1")
    assert refuse(*evaluated, "metric_for_best_model=rouge") == (
        "metric_for_best_model: evaluation gives no eval_rouge. Name one that it gives: "
        "eval_loss, eval_runtime, eval_samples_per_second."
    )


def test_train_when_sets_are_evaluated_apart_asks_which_counts(refuse: Refuse) -> None:
    apart = ("eval_dataset=tiny", "eval_on_each_dataset=true", "eval_strategy=steps", "early_stopping_steps=1")
    assert refuse(*apart) == (
        "metric_for_best_model: evaluation gives no eval_loss. Name one that it gives: eval_tiny_loss."
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_train_when_fp16_on_a_cpu_names_the_ways_out(refuse: Refuse) -> None:
    assert "Use fp16: false to compute in fp32" in refuse("fp16=true")


# --- the disk --------------------------------------------------------------------------------------------------------


_ON_SMALL_DISKS = """
import sys
from fourfold.cli.main import app
for folder in sys.argv[1:3]:
    try:
        app([*sys.argv[3:], f"output_dir={folder}/out"])
    except SystemExit as left:
        print("exit code", left.code, file=sys.stderr)
"""
"""Trains once into each of two folders, and prints the exit codes."""


def test_train_when_the_disk_is_full_says_so_and_keeps_what_was_saved(words: list[str], tmp_path: Path) -> None:
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare to mount small file systems with")
    tiny, small = tmp_path / "tiny", tmp_path / "small"
    tiny.mkdir()
    small.mkdir()
    # file systems that only this command sees and that go when it ends; the config does not fit into the first,
    # one checkpoint fits into the second
    mounts = f"mount -t tmpfs -o size=8k tmpfs {tiny} && mount -t tmpfs -o size=180k tmpfs {small} || exit 99"
    inside = f'{mounts}; "$@"; ls {small}/out >&2'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", inside, "sh", sys.executable, "-c"]
    keys = ["train", *words, "max_steps=3", "save_steps=1"]
    done = subprocess.run(
        [*command, _ON_SMALL_DISKS, tiny, small, *keys], capture_output=True, text=True, timeout=120, check=False
    )
    if done.returncode == 99 or "unshare: " in done.stderr:
        pytest.skip("mounting is not permitted")
    assert done.stderr.count("exit code 2\n") == 2, done.stderr
    assert "Traceback" not in done.stderr
    full = "the disk is full while saving ("
    assert f"{tiny / 'out'}: {full}" in done.stderr
    assert f"{small / 'out' / 'checkpoint-2'}: {full}" in done.stderr
    assert (
        "Free some space, or lower save_total_limit; then start again with resume_from_checkpoint: true." in done.stderr
    )
    assert [line for line in done.stderr.splitlines() if line.startswith("checkpoint-")] == ["checkpoint-1"]
