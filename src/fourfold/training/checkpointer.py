"""Saving and restoring a run: weights as users know them, and beside them what an exact resume needs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fourfold.base.errors import CheckpointError
from fourfold.base.log import get_logger
from fourfold.checkpoint.folder import prune, write_folder
from fourfold.checkpoint.optimizer import NUMBERS, OptimizerState, gather_optimizer, load_optimizer
from fourfold.checkpoint.resume import load_weights
from fourfold.models.identity import BaseIdentity
from fourfold.models.unwrap import TunedModel
from fourfold.models.weights import gather_weights, save_model
from fourfold.parallel.mesh import Mesh
from fourfold.parallel.shares import Shares
from fourfold.training.state import TrainState

log = get_logger(__name__)

_SCHEDULE = "schedule.json"


@dataclass(frozen=True)
class Checkpointer:
    """Writes `checkpoint-<step>` folders of a run and reads them back.

    Attributes:
        mesh: all ranks gather, the first one writes.
        shares: which of the module's parameters are parts of larger ones.
        base: which model an adapter is trained on; written beside it.
        facts: what a resumed run must find as it was (see TrainState.load).
        settings: what else trainer_state.json tells of the run (see TrainState.save).
        only_model: leave out what resuming needs (`save_only_model`).
        limit: checkpoints to keep (`save_total_limit`); the best one always stays.
    """

    output_dir: Path
    module: TunedModel
    tokenizer: PreTrainedTokenizerBase
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler | None
    state: TrainState
    facts: Mapping[str, Any]
    settings: Mapping[str, Any]
    mesh: Mesh
    shares: Shares
    base: BaseIdentity | None = None
    only_model: bool = False
    limit: int | None = None

    def save(self) -> Path:
        """Write the current state, drop what is beyond the limit, and return the folder.

        Raises:
            CheckpointError: the disk is full; earlier checkpoints are untouched.
        """
        target = self.output_dir / f"checkpoint-{self.state.step}"
        weights = self._gather()
        optimizer = None if self.only_model else gather_optimizer(self.optimizer, self.module, self.shares)
        if self.mesh.rank == 0:
            write_folder(target, partial(self._write, weights, optimizer))
            best = self.state.best_step
            prune(self.output_dir, self.limit, None if best is None else self.output_dir / f"checkpoint-{best}")
            log.info("Saved %s", target)
        self.mesh.wait()
        return target

    def save_result(self) -> None:
        """Write weights and state into the run's folder itself."""
        weights = self._gather()
        if self.mesh.rank == 0:
            save_model(self.module, self.output_dir, tokenizer=self.tokenizer, base=self.base, state=weights)
            self.state.save(self.output_dir, self.facts, self.settings)
        self.mesh.wait()

    def _gather(self) -> dict[str, Tensor] | None:
        """The whole weights on rank 0, or None where each rank has them anyway."""
        layout = self.mesh.layout
        whole = layout.world_size == layout.dp_replicate and layout.ep == 1
        return None if whole else gather_weights(self.module, self.shares)

    def _write(self, weights: dict[str, Tensor] | None, optimizer: OptimizerState | None, folder: Path) -> None:
        save_model(self.module, folder, tokenizer=self.tokenizer, base=self.base, state=weights)
        self.state.save(folder, self.facts, self.settings)
        if optimizer is None:
            return
        optimizer.write(folder)
        schedule: dict[str, Any] = {"scheduler": self.scheduler.state_dict()}
        if self.scaler is not None:
            schedule["scaler"] = self.scaler.state_dict()
        (folder / _SCHEDULE).write_text(json.dumps(schedule, default=_drop), encoding="utf-8")

    def load_best(self) -> None:
        """Put back the weights of the best evaluation, if its checkpoint is there (load_best_model_at_end)."""
        folder = self.output_dir / f"checkpoint-{self.state.best_step}"
        if self.state.best_step is None or not folder.is_dir():
            why = "there was no evaluation" if self.state.best_step is None else "the best step is not saved"
            log.warning("load_best_model_at_end: %s, so the last weights are kept. Lower eval_steps.", why)
            return
        load_weights(self.module, folder, self.shares)
        log.info("Loaded the best weights, of step %d (%.6g)", self.state.best_step, self.state.best_metric)

    def restore(self, folder: Path) -> None:
        """Put weights, optimizer and schedule back as `save` wrote them (the state is loaded by its owner).

        Raises:
            CheckpointError: the folder was written with save_only_model.
        """
        if not (folder / NUMBERS).exists():
            raise CheckpointError(
                f"{folder}: was saved with save_only_model, so it has no optimizer state to resume. "
                "Start a new run from its weights instead."
            )
        load_weights(self.module, folder, self.shares)
        load_optimizer(self.optimizer, self.module, folder, self.shares)
        schedule = json.loads((folder / _SCHEDULE).read_text(encoding="utf-8"))
        self._restore_schedule(schedule["scheduler"])
        if self.scaler is not None and "scaler" in schedule:
            self.scaler.load_state_dict(schedule["scaler"])
        log.info("Resumed from %s, step %d", folder, self.state.step)

    def _restore_schedule(self, state: dict[str, Any]) -> None:
        """Put the schedule's position back. Its rates are this run's: its length or height may have been changed."""
        scheduler = self.scheduler
        if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
            scheduler.load_state_dict(state)
            return
        scheduler.load_state_dict({**state, "base_lrs": scheduler.base_lrs})
        for group, base, share in zip(
            scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
        ):
            group["lr"] = base * share(scheduler.last_epoch)


def _drop(value: object) -> None:
    """A schedule's functions are rebuilt from the config; only its numbers are kept."""
