"""Optimizers and the loss scaler on shards do what they do on whole parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Case, Curve, alone, assert_together_same, make_model, run_ranks, under
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from fourfold.config.load import load
from fourfold.parallel.mesh import build_mesh
from fourfold.parallel.sharded import full
from fourfold.parallel.shares import local
from fourfold.planning.layout import Layout
from fourfold.training.optimizers import muon
from fourfold.training.precision import LossScaler

_CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "layout", [Layout(dp_shard=2), Layout(tp=2), Layout(pp=2)], ids=lambda layout: layout.describe()
)
def test_training_when_the_loss_is_scaled_equals_one_process(layout: Layout, unscaled: Curve) -> None:
    assert_together_same(under(Case(scaled=True), layout), unscaled)


@pytest.fixture(scope="module")
def unscaled() -> Curve:
    """One process that does not scale."""
    torch.set_num_threads(1)
    return alone(Case())


def _muon_weights(sharded: bool) -> dict[str, torch.Tensor]:
    """Weights after three steps with given gradients."""
    module = make_model(Case())
    if sharded:
        fully_shard(module, mesh=build_mesh(Layout(dp_shard=dist.get_world_size()), _CPU).view(("dp_shard",)))
    run = load({"model_name_or_path": "m", "output_dir": "o", "dataset": "d", "learning_rate": 1e-2}, verb="train")
    groups: list[dict[str, Any]] = [{"params": list(module.parameters()), "name": "all"}]
    optimizer = muon.build(groups, module, run)
    generator = torch.Generator().manual_seed(5)
    for _ in range(3):
        for parameter in module.parameters():
            grad = torch.randn(parameter.shape, generator=generator)
            if isinstance(parameter, DTensor):
                grad = distribute_tensor(grad, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.grad = grad
        optimizer.step()
    return {name: full(parameter.detach()) for name, parameter in module.named_parameters()}


def test_muon_when_matrices_are_sharded_updates_as_on_whole_ones() -> None:
    (reference,) = run_ranks(1, lambda: _muon_weights(sharded=False))
    for weights in run_ranks(2, lambda: _muon_weights(sharded=True)):
        assert weights.keys() == reference.keys()
        for name, weight in weights.items():
            torch.testing.assert_close(weight, reference[name], rtol=0, atol=1e-7)


def _scaled_step(overflow_on: int | None) -> tuple[bool, float, float]:
    """A step of a sharded layer: whether the shard changed, the scale before and after it."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 6, bias=False)
    fully_shard(layer, mesh=build_mesh(Layout(dp_shard=2), _CPU).view(("dp_shard",)))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    scaler = LossScaler(_CPU)
    scale = scaler.get_scale()
    before = local(layer.weight.detach()).clone()
    layer.weight.grad = torch.ones_like(layer.weight) * scale
    if overflow_on == dist.get_rank():
        local(layer.weight.grad)[0, 0] = float("inf")
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    changed = local(layer.weight.detach()) - before
    assert overflow_on is not None or torch.allclose(changed, torch.tensor(-0.1))
    return bool(changed.any()), scale, scaler.get_scale()


@pytest.mark.parametrize("overflow_on", [None, 0, 1])
def test_step_when_one_shard_overflows_is_skipped_by_all(overflow_on: int | None) -> None:
    for changed, before, after in run_ranks(2, lambda: _scaled_step(overflow_on)):
        assert changed == (overflow_on is None)
        assert after == (before if overflow_on is None else before / 2)
