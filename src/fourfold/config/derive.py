"""Defaults that depend on other keys, filled in once, so that no reader of a run has to know them."""

from __future__ import annotations

from typing import Any

from fourfold.config.schema import Run

_LOW_MEMORY_TOKENS = 1024


def derive(run: Run) -> dict[str, Any]:
    """The values to fill in, by key.

    - lora_alpha is twice lora_rank;
    - neat_packing turns packing on;
    - disable_gradient_checkpointing is gradient_checkpointing: false;
    - eval_strategy: steps evaluates every logging_steps, and any eval_strategy but no means do_eval;
    - memory: low recomputes whole layers and cuts steps into micro-batches of 1,024 tokens;
    - a file that asks for nothing is meant to train;
    - warmup_steps below 1 is warmup_ratio;
    - clip_high is clip_low, or 0.28 for dapo (arXiv 2503.14476);
    - scale_rewards is none for dr_grpo (arXiv 2503.20783), else group;
    - report_to loses `none` and gains what use_swanlab asks for.
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
    if run.parallel.memory == "low":
        values["micro_batch_tokens"] = training.micro_batch_tokens or _LOW_MEMORY_TOKENS
        if (
            run.parallel.recompute == "auto"
            and values.get("gradient_checkpointing", training.gradient_checkpointing) is None
        ):
            values["recompute"] = "full"
    if training.warmup_steps < 1:
        values["warmup_steps"] = 0
        values["warmup_ratio"] = training.warmup_steps or training.warmup_ratio
    learning = run.reinforcement
    if learning.clip_high is None:
        values["clip_high"] = 0.28 if learning.grpo_variant == "dapo" else learning.clip_low
    if learning.scale_rewards is None:
        values["scale_rewards"] = "none" if learning.grpo_variant == "dr_grpo" else "group"
    trackers = tuple(name for name in run.output.report_to if name != "none")
    if run.output.use_swanlab and "swanlab" not in trackers:
        trackers = (*trackers, "swanlab")
    values["report_to"] = trackers
    words = {False: None, "false": None, "true": True}
    if run.output.resume_from_checkpoint in words:
        values["resume_from_checkpoint"] = words[run.output.resume_from_checkpoint]
    return values
