"""Saving and restoring a run: weights as users know them, and beside them what an exact resume needs."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fourfold.base.errors import CheckpointError
from fourfold.base.log import get_logger
from fourfold.checkpoint.folder import failed_writes_told, let_others_read, prune, write_folder
from fourfold.checkpoint.optimizer import NUMBERS, OptimizerState, gather_optimizer, load_optimizer
from fourfold.checkpoint.resume import load_weights
from fourfold.checkpoint.sharded import take_snapshot
from fourfold.config.schema import Run
from fourfold.models.identity import BaseIdentity
from fourfold.models.unwrap import TunedModel
from fourfold.models.value_head import gather_value_head, write_value_head
from fourfold.models.weights import gather_weights, save_frame, save_model
from fourfold.parallel.mesh import Mesh
from fourfold.parallel.shares import Shares
from fourfold.parallel.whole import everyone, parts_of
from fourfold.planning.layout import Layout
from fourfold.training.background import Background
from fourfold.training.resumed import base_as_json
from fourfold.training.schedule import restore_schedule
from fourfold.training.state import TrainState

log = get_logger(__name__)

_SCHEDULE = "schedule.json"
_LARGE_BYTES = 8 << 30
"""Weights from which on checkpoints are sharded by themselves, where ranks share a model."""


def shards_checkpoints(run: Run, module: TunedModel, shares: Shares, layout: Layout) -> bool:
    """Whether each rank writes its own part of the checkpoints; every rank must call.

    `auto` shards what would be slow to gather: a model of some size that the ranks share. Adapters are small, and
    always written as PEFT reads them.
    """
    asked = run.output.save_sharded
    if run.tuning.finetuning_type == "lora":
        if asked is True or run.output.async_save:
            log.info("save_sharded, async_save: an adapter is small, so it is saved at once, as PEFT reads it.")
        return False
    if asked != "auto" or run.output.async_save:
        return bool(asked)
    if not layout.splits_model:
        return False
    held = sum(math.prod(part.shape) * part.local.element_size() for part in parts_of(module, shares).values())
    return sum(everyone(held)) >= layout.world_size * _LARGE_BYTES / layout.pp


@dataclass(frozen=True)
class Checkpointer:
    """Writes `checkpoint-<step>` folders of a run and reads them back.

    Attributes:
        mesh: all ranks gather, the first one writes.
        shares: which of the module's parameters are parts of larger ones.
        base: which model the run began from; written beside an adapter, and into the state.
        facts: what a resumed run must find as it was (see TrainState.load).
        settings: what else trainer_state.json tells of the run (see TrainState.save).
        only_model: leave out what resuming needs (`save_only_model`).
        limit: checkpoints to keep (`save_total_limit`); the best one always stays.
        sharded: each rank writes its part of a whole model (`save_sharded`); the final result is never sharded.
        background: writes beside the training (`async_save`), sharded checkpoints only; None to wait for each.
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
    sharded: bool = False
    background: Background | None = None

    def save(self) -> Path:
        """Write the current state, drop what is beyond the limit, and return the folder.

        With `background` the folder is there only after `wait`, or once the next save begins.

        Raises:
            CheckpointError: the disk is full; earlier checkpoints are untouched. In the background, the next call
                raises it.
        """
        target = self.output_dir / f"checkpoint-{self.state.step}"
        if self.sharded:
            self._save_sharded(target)
            return target
        weights = self._gather()
        optimizer = None if self.only_model else gather_optimizer(self.optimizer, self.module, self.shares)
        if self.mesh.rank == 0:
            write_folder(target, partial(self._write, weights, optimizer))
            self._prune(self.state.best_step)
            log.info("Saved %s", target)
        self.mesh.wait()
        return target

    def wait(self) -> None:
        """Until what is saved in the background is saved; raises what went wrong with it."""
        if self.background is not None:
            self.background.wait()

    def _prune(self, best: int | None) -> None:
        prune(self.output_dir, self.limit, None if best is None else self.output_dir / f"checkpoint-{best}")

    def _save_sharded(self, target: Path) -> None:
        self.wait()
        assert isinstance(self.module, PreTrainedModel), "an adapter is small and saved whole"
        snapshot = take_snapshot(
            self.module,
            None if self.only_model else self.optimizer,
            self.shares,
            copied=self.background is not None,
        )
        values = gather_value_head(self.module, self.shares)
        group = self.host_group
        # what goes on changing while it is written
        state, schedule = copy.deepcopy(self.state), self._schedule()

        def write_rest(folder: Path) -> None:
            assert isinstance(self.module, PreTrainedModel)
            save_frame(self.module, folder, self.tokenizer)
            write_value_head(values, folder)
            state.save(folder, self.facts, self.settings, base_as_json(self.base))
            if not self.only_model:
                (folder / _SCHEDULE).write_text(schedule, encoding="utf-8")

        def job() -> None:
            with failed_writes_told(target):
                snapshot.write(target, write_rest, self.mesh.rank, group)
            if self.mesh.rank == 0:
                self._prune(state.best_step)
                log.info("Saved %s, sharded", target)
            everyone(None, group)

        if self.background is None:
            job()
        else:
            self.background.start(job)

    @cached_property
    def host_group(self) -> dist.ProcessGroup | None:
        """By which ranks agree while they save: in the background not by the group that the training uses."""
        if self.background is None or not dist.is_initialized():
            return None
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup)
        return group

    def save_result(self) -> None:
        """Write weights and state into the run's folder itself."""
        weights = self._gather()
        if self.mesh.rank == 0:
            save_model(self.module, self.output_dir, tokenizer=self.tokenizer, base=self.base, state=weights)
            let_others_read(self.output_dir)
            self.state.save(self.output_dir, self.facts, self.settings, base_as_json(self.base))
        self.mesh.wait()

    def _gather(self) -> dict[str, Tensor] | None:
        """The whole weights on rank 0, or None where each rank has them anyway."""
        return gather_weights(self.module, self.shares) if self.mesh.layout.splits_model else None

    def _write(self, weights: dict[str, Tensor] | None, optimizer: OptimizerState | None, folder: Path) -> None:
        save_model(self.module, folder, tokenizer=self.tokenizer, base=self.base, state=weights)
        self.state.save(folder, self.facts, self.settings, base_as_json(self.base))
        if optimizer is None:
            return
        optimizer.write(folder)
        (folder / _SCHEDULE).write_text(self._schedule(), encoding="utf-8")

    def _schedule(self) -> str:
        """The schedule's position, and the loss scale, as JSON."""
        schedule: dict[str, Any] = {"scheduler": self.scheduler.state_dict()}
        if self.scaler is not None:
            schedule["scaler"] = self.scaler.state_dict()
        return json.dumps(schedule, default=_drop)

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
        restore_schedule(self.scheduler, schedule["scheduler"])
        if self.scaler is not None and "scaler" in schedule:
            self.scaler.load_state_dict(schedule["scaler"])
        log.info("Resumed from %s, step %d", folder, self.state.step)


def _drop(value: object) -> None:
    """A schedule's functions are rebuilt from the config; only its numbers are kept."""
