"""Every precision trains, evaluates and predicts with every tuning, on whatever device there is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from training_runs import run

_PRECISIONS = ["fp32", "bf16", "pure_bf16", *(["fp16"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("tuning", ["lora", "freeze", "full"])
@pytest.mark.parametrize("precision", _PRECISIONS)
def test_precision_when_trained_evaluated_and_predicted_works(
    precision: str, tuning: str, tiny_llama: Path, tiny_data: Path, tmp_path: Path
) -> None:
    results = run(
        tiny_llama,
        tiny_data,
        tmp_path / "run",
        **({} if precision == "fp32" else {precision: True}),
        finetuning_type=tuning,
        freeze_trainable_layers=1,
        max_steps=2,
        val_size=4,
        do_eval=True,
        do_predict=True,
        predict_with_generate=True,
        max_new_tokens=3,
    )
    assert 0 < results["train_loss"] < 20
    assert 0 < results["eval_loss"] < 20
    assert len((tmp_path / "run" / "generated_predictions.jsonl").read_text(encoding="utf-8").splitlines()) == 4
