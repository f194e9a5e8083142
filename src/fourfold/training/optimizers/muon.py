"""Muon for matrices, AdamW for everything else (github.com/KellerJordan/Muon; torch.optim.Muon, torch >= 2.9)."""

from __future__ import annotations

from typing import Any

import torch

from fourfold.config.schema import Run


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


def build(groups: list[dict[str, Any]], run: Run) -> torch.optim.Optimizer:
    """Muon over 2-D parameters that are no embedding or head, AdamW over the rest.

    The update of a matrix is scaled to AdamW's root mean square (`match_rms_adamw`), so that one learning rate
    serves both (arXiv:2502.16982).
    """
    training = run.training
    muon, adamw = [], []
    for group in groups:
        matrices = [p for p in group["params"] if p.ndim == 2 and not group.get("is_embedding", False)]
        others = [p for p in group["params"] if not (p.ndim == 2 and not group.get("is_embedding", False))]
        rest = {name: value for name, value in group.items() if name != "params"}
        if matrices:
            muon.append({**rest, "params": matrices})
        if others:
            adamw.append({**rest, "params": others})
    parts: list[torch.optim.Optimizer] = []
    if muon:
        parts.append(
            torch.optim.Muon(
                muon,
                lr=training.learning_rate,
                weight_decay=training.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    if adamw:
        parts.append(
            torch.optim.AdamW(
                adamw,
                lr=training.learning_rate,
                betas=(training.adam_beta1, training.adam_beta2),
                eps=training.adam_epsilon,
                weight_decay=training.weight_decay,
            )
        )
    return _Pair(parts)
