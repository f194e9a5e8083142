"""Muon for matrices, AdamW for everything else (github.com/KellerJordan/Muon; torch.optim.Muon, torch >= 2.9)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from fourfold.config.schema import Run
from fourfold.models.unwrap import base_model
from fourfold.parallel.sharded import full, local
from fourfold.parallel.stages import value_head_of


class _Pair(torch.optim.Optimizer):
    """Two optimizers over disjoint parameters as one; its groups are theirs, so schedules and scalers just work."""

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        self.parts = parts
        groups = [group for part in parts for group in part.param_groups]
        super().__init__(groups, {})
        # One list of group objects, shared, so that a learning rate set here is seen by the part that uses it.
        start = 0
        for part in parts:
            part.param_groups = self.param_groups[start : start + len(part.param_groups)]
            start += len(part.param_groups)
            part.state = self.state

    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of both parts."""
        for part in self.parts:
            part.step(closure)


class Muon(torch.optim.Muon):
    """Muon that puts sharded matrices together for their update, since orthogonalising needs them whole.

    One at a time, on every rank alike: weight, gradient and momentum are gathered, and each rank keeps its shard.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update; every rank of a sharded matrix must call."""
        assert closure is None, "gradients are there already"
        if not any(isinstance(p, DTensor) for group in self.param_groups for p in group["params"]):
            super().step()
            return
        for group in self.param_groups:
            settings = {name: group[name] for name in self.defaults}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    assert isinstance(parameter, DTensor), "FSDP shards all parameters or none"
                    self._update(parameter, settings)

    def _update(self, parameter: DTensor, settings: dict[str, Any]) -> None:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        assert parameter.grad is not None
        whole = nn.Parameter(full(parameter.detach()).clone())
        whole.grad = full(parameter.grad)
        alone = torch.optim.Muon([whole], **settings)
        momentum = full(state["momentum_buffer"]).clone()
        alone.state[whole]["momentum_buffer"] = momentum
        alone.step()
        for shard, updated in ((parameter, whole), (state["momentum_buffer"], momentum)):
            mine = distribute_tensor(updated.detach(), shard.device_mesh, shard.placements, src_data_rank=None)
            local(shard).copy_(mine.to_local())


def build(groups: list[dict[str, Any]], model: nn.Module, run: Run) -> torch.optim.Optimizer:
    """Muon over 2-D parameters outside embedding and heads, AdamW over the rest.

    The update of a matrix is scaled to AdamW's root mean square (`match_rms_adamw`), so that one learning rate
    serves both (arXiv:2502.16982).
    """
    training = run.training
    inner = base_model(model)
    ends = {
        parameter
        for layer in (inner.get_input_embeddings(), inner.get_output_embeddings(), value_head_of(inner))
        if layer is not None
        for parameter in layer.parameters()
    }
    matrices = _only(groups, lambda p: p.ndim == 2 and p not in ends)
    others = _only(groups, lambda p: p.ndim != 2 or p in ends)
    parts: list[torch.optim.Optimizer] = []
    if matrices:
        settings: dict[str, Any] = {"adjust_lr_fn": "match_rms_adamw", **training.optim_args}
        parts.append(Muon(matrices, lr=training.learning_rate, weight_decay=training.weight_decay, **settings))
    if others:
        betas = (training.adam_beta1, training.adam_beta2)
        parts.append(
            torch.optim.AdamW(
                others,
                lr=training.learning_rate,
                betas=betas,
                eps=training.adam_epsilon,
                weight_decay=training.weight_decay,
            )
        )
    return _Pair(parts)


def _only(groups: list[dict[str, Any]], belongs: Callable[[nn.Parameter], bool]) -> list[dict[str, Any]]:
    """The groups with those of their parameters that belong; empty ones are left out."""
    chosen = [{**group, "params": [p for p in group["params"] if belongs(p)]} for group in groups]
    return [group for group in chosen if group["params"]]
