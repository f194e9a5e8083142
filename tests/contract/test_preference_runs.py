"""Stages dpo and kto by the real command: where they start, what they hold, how they resume."""

from __future__ import annotations

import gc
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fourfold.base.errors import ConfigError
from fourfold.config.load import load
from fourfold.dataset.batch import IGNORE_INDEX
from fourfold.parallel.mesh import single
from fourfold.training import reference
from fourfold.training.assemble import Parts, load_parts
from fourfold.training.reference import add_reference
from tiny_models import save_tiny_model
from training_runs import config, losses, run

CPU = torch.device("cpu")
_DPO: dict[str, Any] = {"stage": "dpo", "dataset": "tiny_pairs", "learning_rate": 1e-3}
_KTO: dict[str, Any] = {"stage": "kto", "dataset": "tiny_tags", "learning_rate": 1e-3}
_FULL = {"finetuning_type": "full", "learning_rate": 1e-4}


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def _parts(model: Path, data: Path, output: Path, **keys: Any) -> Parts:
    output.mkdir(parents=True, exist_ok=True)
    parts = load_parts(load(config(model, data, output, **keys), verb="train"), output, single(CPU))
    add_reference(parts)
    return parts


@pytest.mark.parametrize("tuning", [{}, _FULL, {"quantization_bit": 4}])
def test_dpo_when_it_starts_is_at_ln_2_and_rewards_nothing(
    tuning: dict[str, Any], tiny_llama: Path, tiny_data: Path, tmp_path: Path
) -> None:
    run(tiny_llama, tiny_data, tmp_path, **{**_DPO, **tuning, "max_steps": 3})
    assert losses(tmp_path)[0] == pytest.approx(math.log(2), abs=1e-6)
    for figure in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert losses(tmp_path, figure)[0] == pytest.approx(0, abs=1e-6)
    assert losses(tmp_path)[2] != losses(tmp_path)[0]


def test_dpo_when_its_first_step_is_logged_has_the_log_probabilities_of_plain_torch(
    tiny_llama: Path, tiny_data: Path, tmp_path: Path
) -> None:
    keys = {**_DPO, "max_steps": 1, "disable_shuffling": True}
    run(tiny_llama, tiny_data, tmp_path / "out", **keys)
    parts = _parts(tiny_llama, tiny_data, tmp_path / "parts", **keys)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    assert parts.data.train is not None
    for role in ("chosen", "rejected"):
        sums = []
        for index in range(4):
            example = parts.data.train[index].sequences[role]
            with torch.no_grad():
                logps = model(torch.tensor([example.input_ids])).logits[0, :-1].log_softmax(-1)
            labels = example.labels[1:]
            sums.append(sum(float(logps[i, label]) for i, label in enumerate(labels) if label != IGNORE_INDEX))
        assert losses(tmp_path / "out", f"logps/{role}") == [pytest.approx(sum(sums) / 4, abs=1e-3)]


@pytest.mark.parametrize("keys", [_DPO, _KTO])
@pytest.mark.parametrize("tuning", [{}, _FULL])
def test_a_run_when_it_is_resumed_goes_on_with_the_reference_it_began_with(
    keys: dict[str, Any], tuning: dict[str, Any], tiny_llama: Path, tiny_data: Path, tmp_path: Path
) -> None:
    keys = {**keys, **tuning}
    run(tiny_llama, tiny_data, tmp_path / "whole", **keys)
    run(tiny_llama, tiny_data, tmp_path / "cut", **keys)
    (tmp_path / "cut" / "trainer_log.jsonl").unlink()
    run(tiny_llama, tiny_data, tmp_path / "cut", **keys, resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-6"))
    assert losses(tmp_path / "cut")[-6:] == losses(tmp_path / "whole")[-6:]
    stored = (tmp_path / "whole" / reference.FILE).exists()
    assert stored == bool(tuning)


def test_a_stored_reference_when_the_data_are_the_same_is_read_and_not_computed(
    tiny_llama: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _parts(tiny_llama, tiny_data, tmp_path, **{**_DPO, **_FULL})
    monkeypatch.setattr(reference, "_compute", lambda *_: pytest.fail("it is there already"))
    _parts(tiny_llama, tiny_data, tmp_path, **{**_DPO, **_FULL})


def test_full_dpo_when_two_processes_share_it_has_the_losses_of_one(
    tiny_llama: Path, tiny_data: Path, tmp_path: Path
) -> None:
    keys = {**_DPO, **_FULL, "max_steps": 3, "global_batch_size": 8, "save_strategy": "no"}
    run(tiny_llama, tiny_data, tmp_path / "one", **keys)
    run(tiny_llama, tiny_data, tmp_path / "two", **keys, nproc=2, strategy="fsdp")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


def test_dpo_when_another_model_is_the_reference_compares_with_that(
    tiny_llama: Path, tiny_data: Path, tmp_path: Path
) -> None:
    other = save_tiny_model(tmp_path / "other", seed=5)
    run(tiny_llama, tiny_data, tmp_path / "out", **_DPO, ref_model=str(other), max_steps=1)
    assert abs(losses(tmp_path / "out", "rewards/chosen")[0]) > 1e-3
    run(tiny_llama, tiny_data, tmp_path / "same", **_DPO, ref_model=str(tiny_llama), max_steps=1)
    assert losses(tmp_path / "same", "rewards/chosen")[0] == pytest.approx(0, abs=1e-6)


def _held() -> list[torch.Tensor]:
    """Every tensor of numbers that there is in this process."""
    gc.collect()
    return [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and t.is_floating_point()]


@pytest.mark.parametrize("tuning", [{}, _FULL])
def test_memory_when_a_stage_needs_a_reference_holds_one_base(
    tuning: dict[str, Any], tiny_llama: Path, tiny_data: Path, tmp_path: Path
) -> None:
    before = _held()  # of other tests; kept, so that nothing new takes their place
    parts = _parts(tiny_llama, tiny_data, tmp_path, **{**_DPO, **tuning})
    assert parts.data.train is not None
    parts.policy  # noqa: B018 - settled once
    own = {tensor.untyped_storage().data_ptr() for tensor in (*parts.module.parameters(), *parts.module.buffers())}
    largest = max(p.nbytes for p in parts.module.parameters())
    known = own | {tensor.untyped_storage().data_ptr() for tensor in before}
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _held()}
    beside = [size for pointer, size in held.items() if pointer not in known]
    assert sum(size for size in beside if size >= largest) == 0


@pytest.mark.parametrize("keys", [_DPO, _KTO])
def test_a_full_run_when_the_data_are_streamed_says_what_helps(
    keys: dict[str, Any], tiny_llama: Path, tiny_data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="streaming: the reference's log-probabilities"):
        run(tiny_llama, tiny_data, tmp_path, **{**keys, **_FULL, "streaming": True, "max_steps": 2})


@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "ipo", "kto_pair", "orpo", "simpo", "robust", "exo", "sppo"])
def test_dpo_when_any_of_its_losses_is_chosen_learns_the_pairs(
    kind: str, tiny_llama: Path, tiny_data: Path, tmp_path: Path
) -> None:
    keys = {**_DPO, "learning_rate": 3e-3, "pref_loss": kind, "num_train_epochs": 4, "save_strategy": "no"}
    run(tiny_llama, tiny_data, tmp_path, **keys)
    assert losses(tmp_path, "rewards/margins")[-1] > losses(tmp_path, "rewards/margins")[0]


def test_kto_when_it_trains_raises_good_answers_over_bad_ones(
    tiny_llama: Path, tiny_data: Path, tmp_path: Path
) -> None:
    run(tiny_llama, tiny_data, tmp_path, **{**_KTO, "learning_rate": 3e-3, "num_train_epochs": 6, "val_size": 0.2})
    assert losses(tmp_path)[0] == pytest.approx(0.5, abs=1e-6)  # 1 - sigmoid(0)
    assert losses(tmp_path, "rewards/chosen")[-1] > losses(tmp_path, "rewards/rejected")[-1]


def _pair_folder(folder: Path, rows: list[dict[str, Any]], **entry: Any) -> Path:
    folder.mkdir()
    (folder / "pairs.json").write_text(json.dumps(rows), encoding="utf-8")
    info = {"pairs": {"file_name": "pairs.json", "ranking": True, **entry}}
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    return folder


def test_pairs_when_their_answers_are_the_same_are_counted_and_the_first_is_named(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"instruction": f"Say {n}", "chosen": "red", "rejected": "red" if n % 3 == 1 else "blue"} for n in range(6)]
    columns = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
    data = _pair_folder(tmp_path / "data", rows, columns=columns)
    run(tiny_llama, data, tmp_path / "out", **{**_DPO, "dataset": "pairs", "max_steps": 1})
    told = caplog.text
    assert "dataset pairs: 2 rows dropped (chosen and rejected are the same)" in told
    assert "First row dropped (chosen and rejected are the same): " in told
    assert "row 2" in told


def test_pairs_when_they_are_whole_talks_are_split_where_the_answers_begin(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def talk(*texts: str) -> list[dict[str, str]]:
        return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]

    rows = [{"chosen": talk("a", "red"), "rejected": talk("b" if n == 2 else "a", "blue")} for n in range(4)]
    columns = {"chosen": "chosen", "rejected": "rejected"}
    data = _pair_folder(tmp_path / "data", rows, formatting="openai", columns=columns)
    parts = _parts(tiny_llama, data, tmp_path / "out", **{**_DPO, "dataset": "pairs"})
    assert "dataset pairs: 1 rows dropped (chosen and rejected answer different prompts)" in caplog.text
    assert parts.data.train is not None
    assert len(parts.data.train) == 3
    chosen, rejected = parts.data.train[0].sequences.values()
    prompt = [label == IGNORE_INDEX for label in chosen.labels].index(False)
    assert 0 < prompt == [label == IGNORE_INDEX for label in rejected.labels].index(False)
    assert chosen.input_ids[:prompt] == rejected.input_ids[:prompt]


def test_dpo_when_steps_are_logged_together_tells_the_mean_of_their_figures(
    tiny_llama: Path, tiny_data: Path, tmp_path: Path
) -> None:
    for every in (1, 3):
        run(tiny_llama, tiny_data, tmp_path / str(every), **_DPO, max_steps=6, logging_steps=every)
    for figure in ("loss", "rewards/margins", "logps/chosen"):
        each, together = (losses(tmp_path / str(every), figure) for every in (1, 3))
        assert together == pytest.approx([sum(each[:3]) / 3, sum(each[3:]) / 3], rel=1e-6)
        assert each[2] != pytest.approx(sum(each[:3]) / 3, rel=1e-6)
