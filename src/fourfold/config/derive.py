"""Defaults that depend on other keys, filled in once, so that no reader of a run has to know them."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from fourfold.base import registry
from fourfold.config.schema import Run

ALWAYS_ON = ("console", "jsonl")
"""Trackers that every run has."""


def derive(run: Run) -> dict[str, Any]:
    """The values to fill in, by key.

    - lora_alpha is twice lora_rank;
    - neat_packing turns packing on;
    - disable_gradient_checkpointing is gradient_checkpointing: false;
    - eval_strategy: steps evaluates every logging_steps, and any eval_strategy but no means do_eval;
    - a file that asks for nothing is meant to train;
    - report_to loses `none`, and `all` becomes the trackers that are installed.
    """
    training, values = run.training, dict[str, Any]()
    if run.tuning.lora_alpha is None:
        values["lora_alpha"] = 2 * run.tuning.lora_rank
    if run.data.neat_packing and run.data.packing is None:
        values["packing"] = True
    if training.disable_gradient_checkpointing and training.gradient_checkpointing is None:
        values["gradient_checkpointing"] = False
    if training.eval_strategy != "no":
        values["do_eval"] = True
        if training.eval_strategy == "steps" and training.eval_steps is None:
            values["eval_steps"] = run.output.logging_steps
    if not (training.do_train or training.do_eval or training.do_predict) and "do_train" not in run.source:
        values["do_train"] = True
    if run.output.report_to:
        values["report_to"] = _trackers(run.output.report_to)
    if run.output.resume_from_checkpoint is False:
        values["resume_from_checkpoint"] = None
    return {name: value for name, value in values.items()}


def _trackers(asked: tuple[str, ...]) -> tuple[str, ...]:
    if "all" in asked:
        optional = (name for name in registry.names("fourfold.trackers") if name not in ALWAYS_ON)
        return tuple(name for name in optional if importlib.util.find_spec(name) is not None)
    return tuple(name for name in asked if name not in ("none", *ALWAYS_ON))
