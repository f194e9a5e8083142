"""What goes fast is chosen by what the model, the mesh and the config allow."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from fourfold.config.load import load
from fourfold.models.adapters import attach
from fourfold.models.forward import StepModel
from fourfold.parallel.mesh import single
from fourfold.training import fast
from fourfold.training.fast import Fast, what_goes, wished
from fourfold.training.precision import resolve
from tiny_models import tiny_model

_BOTH = Fast(compiled=True, graphs=True)


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "takes_offsets", lambda *_: True)


def chosen(family: str, targets: str | None = None, *, balance: bool = False, **keys: Any) -> Fast:
    """What goes of both, for a model with adapters on `targets`, or fully tuned."""
    tuning = {"finetuning_type": "full"} if targets is None else {"finetuning_type": "lora", "lora_target": targets}
    run = load({"model_name_or_path": "m", "dataset": "d", "output_dir": "o", **tuning, **keys}, verb="train")
    precision = resolve(run)
    module = attach(tiny_model(family), run.model, run.tuning, trainable=True, master_dtype=precision.master)
    step_model = StepModel(module, packed=True, balance_experts=balance)
    return what_goes(_BOTH, step_model, single(torch.device("cuda")), precision, run)


def test_choice_when_the_model_is_dense_is_both_with_adapters_and_compiled_without() -> None:
    assert chosen("llama", "q_proj", bf16=True) == _BOTH
    assert chosen("llama", bf16=True) == Fast(compiled=True)


def test_choice_when_there_are_experts_is_compiled_in_bf16() -> None:
    assert chosen("qwen3_moe", bf16=True) == Fast(compiled=True)
    assert chosen("qwen3_moe", "q_proj", bf16=True) == Fast(compiled=True)
    assert chosen("qwen3_moe") == Fast()  # in fp32


def test_choice_when_experts_have_adapters_or_their_balance_counts_is_neither(caplog: pytest.LogCaptureFixture) -> None:
    fast.log.propagate = True
    caplog.set_level(logging.INFO)
    assert chosen("qwen3_moe", "all", bf16=True) == Fast()
    assert chosen("qwen3_moe", balance=True, bf16=True) == Fast()
    reasons = [message for message in caplog.messages if message.startswith("Layers are not compiled")]
    assert "adapters" in reasons[0]
    assert "balance" in reasons[1]


@pytest.mark.parametrize(
    ("steps", "keys", "compiled"),
    [
        (60, {}, True),
        (59, {}, False),
        (59, {"torch_compile": True}, True),
        (600, {"torch_compile": False}, False),
        (5, {"fp8": True, "finetuning_type": "full", "bf16": True}, True),
    ],
)
def test_wish_when_a_run_is_long_enough_or_asked_to_is_compiled(
    steps: int, keys: dict[str, object], compiled: bool
) -> None:
    run = load({"model_name_or_path": "m", "dataset": "d", "output_dir": "o", **keys}, verb="train")
    assert wished(run, steps) == Fast(compiled=compiled, graphs=True)
