"""Answers to the evaluation set are the same file under every layout."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Lfm2Config

from fourfold.base.errors import PlanError
from fourfold.config.load import load
from fourfold.config.schema import Run
from fourfold.training.machines import choose_layout
from fourfold.training.run import train
from training_runs import config

LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "ddp2": {"nproc": 2, "strategy": "ddp"},
    "tp2": {"nproc": 2, "strategy": "tp"},
    "pp2": {"nproc": 2, "strategy": "pp"},
    "fsdp2": {"nproc": 2, "strategy": "fsdp"},
}
_ASKED: dict[str, Any] = {
    "do_train": False,
    "do_predict": True,
    "predict_with_generate": True,
    "eval_dataset": "tiny",
    "max_new_tokens": 6,
    "per_device_eval_batch_size": 1,  # so that the 22 rows take several portions, the last of which is uneven
    "use_cpu": True,
    "finetuning_type": "full",
}


def _run(model: Path, data: Path, output: Path, **keys: Any) -> Run:
    cfg = config(model, data, output, **_ASKED, **keys)
    del cfg["dataset"]
    return load(cfg, verb="train")


@pytest.fixture(scope="module")
def answered(
    model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[list[dict[str, str]], dict[str, float]]]:
    """Lines and figures of whole runs."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("answers")
    found = {}
    for name, layout in LAYOUTS.items():
        train(_run(model, data, folder / name, **layout))
        text = (folder / name / "generated_predictions.jsonl").read_text(encoding="utf-8")
        results = json.loads((folder / name / "predict_results.json").read_text(encoding="utf-8"))
        found[name] = [json.loads(line) for line in text.splitlines()], results
    return found


@pytest.mark.parametrize("layout", sorted(set(LAYOUTS) - {"one"}))
def test_answers_when_sampled_by_several_processes_are_those_of_one(layout: str, answered: dict[str, Any]) -> None:
    expected, figures = answered["one"]
    lines, found = answered[layout]
    assert lines == expected
    assert len(lines) == 22
    assert len({line["predict"] for line in lines}) > 15
    timed = {name for name in figures if name.endswith(("runtime", "per_second"))}
    assert {name: found[name] for name in found if name not in timed} == pytest.approx(
        {name: figures[name] for name in figures if name not in timed}, abs=1e-5
    )


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"num_beams": 2}, "num_beams: 2 needs the whole model on a rank. Use num_beams: 1, or strategy: ddp."),
        ({"eval_num_beams": 3, "num_beams": 2}, "eval_num_beams: 3 needs the whole model"),
    ],
)
def test_beams_when_the_model_is_split_are_refused(keys: dict[str, Any], message: str, model: Path) -> None:
    with pytest.raises(PlanError, match=re.escape(message)):
        choose_layout(_run(model, Path("data"), Path("out"), **LAYOUTS["fsdp2"], **keys), 2)


def test_answers_of_a_recurrent_model_when_it_is_split_are_refused(tmp_path: Path) -> None:
    kinds = ["conv", "full_attention"]
    Lfm2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, layer_types=kinds).save_pretrained(tmp_path)
    run = _run(tmp_path, Path("data"), Path("out"), **LAYOUTS["fsdp2"])
    with pytest.raises(PlanError, match="^predict_with_generate: a lfm2 model must be whole on a rank to answer"):
        choose_layout(run, 2)
    replicas = _run(tmp_path, Path("data"), Path("out"), **LAYOUTS["ddp2"])
    assert choose_layout(replicas, 2).dp_replicate == 2


def test_answers_with_beams_when_ranks_are_replicas_are_those_of_one(model: Path, data: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    texts = []
    for name in ("one", "ddp2"):
        keys = {"num_beams": 2, "do_sample": False, "max_samples": 3}
        train(_run(model, data, tmp_path / name, **LAYOUTS[name], **keys))
        texts.append((tmp_path / name / "generated_predictions.jsonl").read_text(encoding="utf-8"))
    assert texts[0] == texts[1]
    assert len(texts[0].splitlines()) == 3
