"""What a run remembers from step to step, and writes into every checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fourfold.base.errors import CheckpointError

FILE = "trainer_state.json"


@dataclass
class TrainState:
    """Progress of a run.

    Attributes:
        step: optimizer steps done.
        epoch: epochs done, with fraction.
        num_tokens: input tokens trained, without padding.
        num_samples: samples trained.
        total_flos: floating-point operations, counted as 6 * tokens * parameters without embeddings (the
            convention of Transformers' Trainer).
        loss_sum: sum of the losses of all steps.
        window_loss, window_steps: the same since the last logged step.
        window_sums, window_counts: of the other figures since then, by name: their sum, and of how many steps.
        train_runtime_s: seconds spent training, over all starts of the run.
        best_metric, best_step: the best evaluation and its step.
        evaluations_since_best: for early stopping.
        practice: what a reinforcement stage goes on with (the weight of the KL, say).
        log_history: every logged row.
    """

    step: int = 0
    epoch: float = 0.0
    num_tokens: int = 0
    num_samples: int = 0
    total_flos: float = 0.0
    loss_sum: float = 0.0
    window_loss: float = 0.0
    window_steps: int = 0
    window_sums: dict[str, float] = field(default_factory=dict)
    window_counts: dict[str, int] = field(default_factory=dict)
    train_runtime_s: float = 0.0
    best_metric: float | None = None
    best_step: int | None = None
    evaluations_since_best: int = 0
    practice: dict[str, float] = field(default_factory=dict)
    log_history: list[dict[str, Any]] = field(default_factory=list)

    def save(
        self,
        folder: Path,
        facts: Mapping[str, Any],
        settings: Mapping[str, Any],
        base: Mapping[str, Any] | None = None,
    ) -> None:
        """Write trainer_state.json: the fields that Transformers' users read, and Fourfold's own beside them.

        Args:
            facts: constants of the run that a resume must find unchanged.
            settings: further fields that Transformers' users read, e.g. max_steps; a resume may change them.
            base: which model the run began from (training/resumed.py); None where that cannot be told.
        """
        best = None if self.best_step is None else f"checkpoint-{self.best_step}"
        content = {
            "best_metric": self.best_metric,
            "best_global_step": self.best_step,
            "best_model_checkpoint": best,
            "epoch": self.epoch,
            "global_step": self.step,
            "num_input_tokens_seen": self.num_tokens,
            "total_flos": self.total_flos,
            "log_history": self.log_history,
            **settings,
            "fourfold": {
                "state": {k: v for k, v in asdict(self).items() if k != "log_history"},
                "facts": dict(facts),
                "base": base,
            },
        }
        (folder / FILE).write_text(json.dumps(content, indent=2), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, facts: dict[str, Any]) -> TrainState:
        """Read what `save` wrote.

        Raises:
            CheckpointError: the run that wrote it differs in `facts`, so its position would mean something else.
        """
        content = json.loads((folder / FILE).read_text(encoding="utf-8"))
        if "fourfold" not in content:
            raise CheckpointError(f"{folder / FILE}: was not written by Fourfold, so it cannot be resumed exactly.")
        refuse_changes(folder, content["fourfold"]["facts"], facts)
        return cls(**content["fourfold"]["state"], log_history=content["log_history"])


def refuse_changes(folder: Path, saved: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose facts differ; what only one side has is not compared.

    Raises:
        CheckpointError: names each that differs, with both values.
    """
    changed = [_change(key, saved[key], new) for key, new in facts.items() if key in saved and saved[key] != new]
    if changed:
        raise CheckpointError(
            f"{folder}: cannot be resumed with another setting ({'; '.join(changed)}). Set it as it was, or start "
            "a new run with adapter_name_or_path or model_name_or_path at this folder."
        )


def _change(key: str, then: object, now: object) -> str:
    """What differs, in the words of the config."""
    if key == "data":
        return "data: the samples are others; look at dataset, template, cutoff_len, packing and what else makes them"
    told = f"{key}: {then!r} then, {now!r} now"
    return f"{told}, give global_batch_size={then}" if key == "samples_per_step" else told
