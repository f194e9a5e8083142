"""Stage rm by the real command: it learns, resumes, is saved as others know it, and scores."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fourfold.base.errors import CheckpointError, ModelError
from fourfold.checkpoint.export import export
from fourfold.config.load import load
from fourfold.dataset.prepare import prepare
from fourfold.models.renderer import load_renderer
from fourfold.models.scorer import RewardScorer
from fourfold.models.value_head import FILE
from training_runs import config, losses, run

CPU = torch.device("cpu")
_RM: dict[str, Any] = {"stage": "rm", "dataset": "tiny_pairs"}
_TUNINGS: dict[str, dict[str, Any]] = {
    "lora": {"learning_rate": 3e-3},
    "full": {"finetuning_type": "full", "learning_rate": 3e-4, "bf16": True},
    "freeze": {"finetuning_type": "freeze", "freeze_trainable_layers": 1, "learning_rate": 1e-3},
    "qlora": {"quantization_bit": 4, "learning_rate": 3e-3},
}


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="module")
def trained(tiny_llama: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each kind of tuning, scored at its end."""
    folders = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        for tuning, keys in _TUNINGS.items():
            folders[tuning] = tmp_path_factory.mktemp(tuning)
            run(tiny_llama, tiny_data, folders[tuning], **_RM, **keys, val_size=6, do_predict=True)
    return folders


def loaded_by(tuning: str, base: Path, folder: Path) -> dict[str, Any]:
    """The keys that name a trained reward model."""
    if tuning in ("full", "freeze"):
        return {"model_name_or_path": str(folder), "finetuning_type": "full"}
    bits = {"quantization_bit": 4} if tuning == "qlora" else {}
    return {"model_name_or_path": str(base), "adapter_name_or_path": str(folder), "finetuning_type": "lora", **bits}


def scores_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "generated_predictions.jsonl").read_text().splitlines()]


def test_rm_when_it_trains_learns_its_pairs(tiny_llama: Path, tiny_data: Path, tmp_path: Path) -> None:
    run(tiny_llama, tiny_data, tmp_path, **_RM, learning_rate=3e-3, num_train_epochs=6, save_strategy="no")
    accuracies = losses(tmp_path, "accuracy")
    assert sum(accuracies[-5:]) / 5 >= 0.9
    assert losses(tmp_path)[-1] < 0.5 * losses(tmp_path)[0]
    assert losses(tmp_path, "rewards/margins")[-1] > 1.0


@pytest.mark.parametrize("tuning", sorted(_TUNINGS))
def test_rm_when_resumed_goes_on_bit_for_bit(
    tuning: str, trained: dict[str, Path], tiny_llama: Path, tiny_data: Path, tmp_path: Path
) -> None:
    part = tmp_path / "part"
    shutil.copytree(trained[tuning], part)
    for later in ("checkpoint-6", "checkpoint-9"):
        shutil.rmtree(part / later, ignore_errors=True)
    keys = {**_RM, **_TUNINGS[tuning], "val_size": 6, "resume_from_checkpoint": str(part / "checkpoint-3")}
    run(tiny_llama, tiny_data, part, **keys)
    assert losses(part) == losses(trained[tuning])
    for name in (FILE, "adapter_model.safetensors" if "lora" in tuning else "model.safetensors"):
        ours, theirs = load_file(part / name), load_file(trained[tuning] / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name


@pytest.mark.parametrize("tuning", sorted(_TUNINGS))
def test_rm_when_its_result_scores_gives_the_scores_of_the_trained_model(
    tuning: str, trained: dict[str, Path], tiny_llama: Path, tiny_data: Path, tmp_path: Path
) -> None:
    folder, keys = trained[tuning], {**_RM, **loaded_by(tuning, tiny_llama, trained[tuning])}
    bf16 = _TUNINGS[tuning].get("bf16", False)
    shown = run(tiny_llama, tiny_data, tmp_path, **keys, val_size=6, do_train=False, do_predict=True, bf16=bf16)
    expected = scores_of(folder)
    assert len(expected) == 6
    for ours, theirs in zip(scores_of(tmp_path), expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-2 if bf16 else 1e-5)
    right = sum(row["chosen"] > row["rejected"] for row in expected) / 6
    assert shown["predict_rewards/accuracies"] == pytest.approx(right)
    assert "predict_loss" in shown


@pytest.mark.parametrize("tuning", sorted(_TUNINGS))
def test_scorer_when_given_the_tokens_of_answers_gives_what_the_run_wrote(
    tuning: str, trained: dict[str, Path], tiny_llama: Path, tiny_data: Path, tmp_path: Path
) -> None:
    keys = {**_RM, **loaded_by(tuning, tiny_llama, trained[tuning]), "val_size": 6, "infer_dtype": "float32"}
    scored = load(config(tiny_llama, tiny_data, tmp_path, **keys), verb="train")
    tokenizer, renderer = load_renderer(scored)
    rows = prepare(scored, tokenizer, renderer).eval[""]
    scorer = RewardScorer.load(scored, CPU, max_tokens=100)
    tokens = [rows[i].sequences[role].input_ids for role in ("rejected", "chosen") for i in range(6)]
    found = scorer.score(tokens)
    expected = [row[role] for role in ("rejected", "chosen") for row in scores_of(trained[tuning])]
    assert found == pytest.approx(expected, abs=5e-2 if _TUNINGS[tuning].get("bf16") else 1e-5)
    assert scorer.score(tokens[::-1]) == pytest.approx(found[::-1], abs=1e-5)
    assert scorer.score([]) == []
    with pytest.raises(ValueError, match="without tokens"):
        scorer.score([[5], []])


def test_rm_when_begun_from_a_trained_one_starts_with_its_head(
    trained: dict[str, Path], tiny_llama: Path, tiny_data: Path, tmp_path: Path
) -> None:
    keys = {**_RM, **loaded_by("lora", tiny_llama, trained["lora"]), "val_size": 6, "do_eval": True}
    shown = run(tiny_llama, tiny_data, tmp_path, **keys, max_steps=1, learning_rate=1e-12)
    before = json.loads((trained["lora"] / "predict_results.json").read_text())
    assert shown["eval_loss"] == pytest.approx(before["predict_loss"], abs=1e-5)


def test_rm_when_a_best_checkpoint_is_wanted_by_accuracy_ends_with_it(
    tiny_llama: Path, tiny_data: Path, tmp_path: Path
) -> None:
    keys = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True, "val_size": 6}
    shown = run(tiny_llama, tiny_data, tmp_path, **_RM, **keys, metric_for_best_model="accuracy", do_eval=True)
    history = losses(tmp_path, "eval_accuracy")
    assert shown["eval_accuracy"] == max(history)
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    best = tmp_path / f"checkpoint-{state['best_global_step']}" / FILE
    assert load_file(best).keys() == load_file(tmp_path / FILE).keys()
    assert all(torch.equal(tensor, load_file(best)[name]) for name, tensor in load_file(tmp_path / FILE).items())


def test_export_when_it_is_a_reward_model_takes_the_value_head_along(
    trained: dict[str, Path], tiny_llama: Path, tmp_path: Path
) -> None:
    keys = {"stage": "rm", **loaded_by("lora", tiny_llama, trained["lora"]), "export_dir": str(tmp_path / "merged")}
    export(load({**keys, "template": "chatml", "use_cpu": True}, verb="export"))
    assert (tmp_path / "merged" / FILE).read_bytes() == (trained["lora"] / FILE).read_bytes()
    scorers = [
        RewardScorer.load(load({"stage": "rm", **named}), CPU)
        for named in (
            loaded_by("lora", tiny_llama, trained["lora"]),
            {"model_name_or_path": str(tmp_path / "merged"), "finetuning_type": "full"},
        )
    ]
    adapted, merged = (scorer.score([[5, 6, 7], [9, 8]]) for scorer in scorers)
    assert merged == pytest.approx(adapted, abs=1e-4)


def test_export_when_a_reward_model_has_no_head_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    keys = {"model_name_or_path": str(tiny_llama), "export_dir": str(tmp_path / "out"), "template": "chatml"}
    with pytest.raises(ModelError, match=r"has no value_head\.safetensors, so it is no reward model"):
        export(load({**keys, "stage": "rm", "use_cpu": True}, verb="export"))


def test_scoring_when_the_model_is_no_reward_model_is_refused(
    tiny_llama: Path, tiny_data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"has no value_head\.safetensors, so it is no reward model\. Train one"):
        run(tiny_llama, tiny_data, tmp_path, **_RM, val_size=6, do_train=False, do_predict=True)


def test_resume_when_the_value_head_is_gone_names_its_file(
    trained: dict[str, Path], tiny_llama: Path, tiny_data: Path, tmp_path: Path
) -> None:
    part = tmp_path / "part"
    shutil.copytree(trained["lora"], part)
    (part / "checkpoint-3" / FILE).unlink()
    keys = {**_RM, **_TUNINGS["lora"], "val_size": 6, "resume_from_checkpoint": str(part / "checkpoint-3")}
    with pytest.raises(CheckpointError, match=r"checkpoint-3/value_head\.safetensors: is missing"):
        run(tiny_llama, tiny_data, part, **keys)


def test_rm_when_muon_trains_leaves_the_value_head_to_adamw(tiny_llama: Path, tiny_data: Path, tmp_path: Path) -> None:
    """A head is no matrix between hidden states: orthogonalising its one row would leave only its direction."""
    keys = {**_RM, "optim": "muon", "finetuning_type": "full", "learning_rate": 1e-4, "max_steps": 2, "save_steps": 2}
    run(tiny_llama, tiny_data, tmp_path, **keys)
    names = load_file(tmp_path / "checkpoint-2" / "optimizer.safetensors")
    assert "v_head.summary.weight|exp_avg" in names
    assert "v_head.summary.weight|momentum_buffer" not in names
    assert any(name.endswith("q_proj.weight|momentum_buffer") for name in names)
