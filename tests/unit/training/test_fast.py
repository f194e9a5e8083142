"""What goes fast is chosen by what the model, the mesh and the config allow."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch

from fourfold.config.load import load
from fourfold.models.adapters import attach
from fourfold.models.forward import StepModel
from fourfold.parallel.local_experts import use_local_experts
from fourfold.parallel.mesh import single
from fourfold.planning.layout import Layout
from fourfold.training import fast
from fourfold.training.fast import Fast, what_goes, wished
from fourfold.training.precision import resolve
from tiny_models import tiny_model

_BOTH = Fast(compiled=True, graphs=True)


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "takes_offsets", lambda *_: True)


def chosen(
    family: str,
    targets: str | None = None,
    *,
    balance: bool = False,
    layout: Layout | None = None,
    local: bool = True,
    **keys: Any,
) -> Fast:
    """What goes of both, for a model with adapters on `targets`, or fully tuned."""
    tuning = {"finetuning_type": "full"} if targets is None else {"finetuning_type": "lora", "lora_target": targets}
    run = load({"model_name_or_path": "m", "dataset": "d", "output_dir": "o", **tuning, **keys}, verb="train")
    precision = resolve(run)
    module = attach(tiny_model(family), run.model, run.tuning, trainable=True, master_dtype=precision.master)
    if local:
        use_local_experts(module)
    step_model = StepModel(module, packed=True, balance_experts=balance)
    mesh = single(torch.device("cuda"))
    return what_goes(_BOTH, step_model, mesh if layout is None else replace(mesh, layout=layout), precision, run)


def test_choice_when_the_model_is_dense_is_both_with_adapters_and_compiled_without() -> None:
    assert chosen("llama", "q_proj", bf16=True) == _BOTH
    assert chosen("llama", bf16=True) == Fast(compiled=True)


@pytest.mark.parametrize(
    ("targets", "keys", "apart"),
    [
        (None, {"bf16": True}, None),
        ("q_proj", {"bf16": True}, None),
        (None, {}, "bf16 alone"),
        ("all", {"bf16": True}, None),
        ("all", {"bf16": True, "local": False}, "adapters that are added"),
        (None, {"bf16": True, "layout": Layout(dp_shard=2, ep=2)}, "ranks share them"),
        (None, {"bf16": True, "layout": Layout(tp=2)}, "ranks share them"),
        (None, {"bf16": True, "layout": Layout(pp=2)}, None),
    ],
)
def test_choice_when_there_are_experts_is_compiled_with_them_or_around_them(
    targets: str | None, keys: dict[str, Any], apart: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    fast.log.propagate = True
    caplog.set_level(logging.INFO)
    assert chosen("qwen3_moe", targets, **keys) == Fast(compiled=True, around_experts=apart is not None)
    assert (apart or "Layers are compiled;") in caplog.text


def test_choice_when_the_balance_of_experts_counts_is_compiled_around_routers(caplog: pytest.LogCaptureFixture) -> None:
    fast.log.propagate = True
    caplog.set_level(logging.INFO)
    assert chosen("qwen3_moe", balance=True, bf16=True) == Fast(compiled=True)
    assert "Layers are compiled around their routers, whose balance is part of the loss;" in caplog.text


@pytest.mark.parametrize(
    ("family", "layout", "reason"),
    [
        ("llama", Layout(tp=2), None),
        ("llama", Layout(dp_shard=2, pp=2), None),
        ("llama", Layout(pp=2, pp_schedule="zbv"), "in two parts"),
        ("llama", Layout(tp=2, cp=2), None),
    ],
)
def test_choice_when_tp_or_pp_split_layers_is_compiled_but_for_zbv(
    family: str, layout: Layout, reason: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    fast.log.propagate = True
    caplog.set_level(logging.INFO)
    assert chosen(family, layout=layout, bf16=True) == Fast(compiled=reason is None)
    assert (reason or "Layers are compiled") in caplog.text


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
