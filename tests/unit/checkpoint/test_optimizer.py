"""Optimizer state by names: what is loaded continues exactly as what was saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from fourfold.base.errors import CheckpointError
from fourfold.checkpoint.optimizer import gather_optimizer, load_optimizer
from fourfold.config.load import load
from fourfold.parallel.shares import Shares
from fourfold.training.optimizers import adafactor, adamw_torch, muon, sgd
from tiny_models import tiny_model


def _model() -> PreTrainedModel:
    return tiny_model("llama").train()


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    ids = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(seed))
    model(input_ids=ids).logits.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    weights = [p for p in model.parameters() if p.ndim == 2]
    biases = [p for p in model.parameters() if p.ndim == 1]
    return [{"params": weights, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0, "lr": 5e-3}]


@pytest.mark.parametrize("kind", [adamw_torch, adafactor, muon, sgd], ids=lambda kind: kind.__name__.split(".")[-1])
def test_load_optimizer_when_resumed_continues_bit_for_bit(kind: Any, tmp_path: Path) -> None:
    run = load({"learning_rate": 1e-2, "weight_decay": 0.05})
    model = _model()
    optimizer = kind.build(_groups(model), model, run)
    for seed in range(3):
        _step(model, optimizer, seed)
    gather_optimizer(optimizer, model, Shares()).write(tmp_path)
    resumed = _model()
    resumed.load_state_dict(model.state_dict())
    other = kind.build(_groups(resumed), resumed, run)
    load_optimizer(other, resumed, tmp_path, Shares())
    for seed in range(3, 6):
        _step(model, optimizer, seed)
        _step(resumed, other, seed)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_load_optimizer_when_another_kind_says_so(tmp_path: Path) -> None:
    run, model = load({}), _model()
    gather_optimizer(sgd.build(_groups(model), model, run), model, Shares()).write(tmp_path)
    with pytest.raises(CheckpointError, match="holds the state of SGD, this run uses AdamW"):
        load_optimizer(adamw_torch.build(_groups(model), model, run), model, tmp_path, Shares())


def test_muon_when_matrices_and_vectors_uses_both_rules() -> None:
    model = _model()
    optimizer = muon.build(_groups(model), model, load({}))
    assert isinstance(optimizer.parts[0], torch.optim.Muon)
    assert isinstance(optimizer.parts[1], torch.optim.AdamW)
    assert model.get_input_embeddings().weight in optimizer.parts[1].param_groups[0]["params"]
    optimizer.param_groups[0]["lr"] = 0.5
    assert optimizer.parts[0].param_groups[0]["lr"] == 0.5


def test_load_optimizer_when_a_setting_changed_keeps_the_new_one(tmp_path: Path) -> None:
    model = _model()
    optimizer = adamw_torch.build(_groups(model), model, load({"adam_beta2": 0.999}))
    _step(model, optimizer, 0)
    gather_optimizer(optimizer, model, Shares()).write(tmp_path)
    other = adamw_torch.build(_groups(model), model, load({"adam_beta2": 0.95}))
    load_optimizer(other, model, tmp_path, Shares())
    assert [group["betas"] for group in other.param_groups] == [(0.9, 0.95)] * 2
