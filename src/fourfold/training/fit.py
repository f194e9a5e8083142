"""Putting the loop together: optimizer, schedule, checkpoints and trackers around the loaded parts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from fourfold.base import registry
from fourfold.base.errors import ConfigError
from fourfold.base.log import get_logger
from fourfold.base.units import format_count
from fourfold.checkpoint.resume import find_checkpoint
from fourfold.config.output import OutputConfig
from fourfold.config.training import TrainingConfig
from fourfold.dataset.loader import SampleSource, StepLoader
from fourfold.models.groups import parameter_groups
from fourfold.models.unwrap import base_model
from fourfold.models.weights import save_model
from fourfold.trackers.interface import RunInfo, Tracker, open_trackers
from fourfold.trackers.reports.results import speed
from fourfold.training.assemble import Parts
from fourfold.training.checkpointer import Checkpointer
from fourfold.training.evaluate import Evaluator
from fourfold.training.loop import Loop, LoopSettings
from fourfold.training.schedule import Budget, Cadence, cadence, make_scheduler, plan_steps
from fourfold.training.state import TrainState

log = get_logger(__name__)

_OPTIMIZERS = "fourfold.training.optimizers"


def fit(parts: Parts, source: SampleSource) -> dict[str, float]:
    """Train to the end of the budget, and save the result into the run's folder.

    Returns:
        the figures of train_results.json.
    """
    run, output_dir = parts.run, parts.output_dir
    budget = plan_steps(run.training, len(source), parts.layout.dp)
    facts = run_facts(parts, source, budget)
    resume = run.output.resume_from_checkpoint
    resumed = find_checkpoint(resume, output_dir) if resume else None
    state = TrainState() if resumed is None else TrainState.load(resumed, facts)
    _announce(parts, budget, len(source), state)
    name = run.output.run_name or output_dir.name
    trackers = open_trackers(run.output.report_to, RunInfo(output_dir, name, budget.max_steps, state.step, run.flat()))
    try:
        loop, checkpointer = build_loop(parts, source, budget, state, trackers, facts)
        if resumed is not None:
            checkpointer.restore(resumed)
        loop.fit()
        if run.training.load_best_model_at_end:
            checkpointer.load_best()
    finally:
        for tracker in trackers:
            tracker.finish()
    save_model(parts.module, output_dir, tokenizer=parts.tokenizer, base=parts.base)
    state.save(output_dir, facts)
    return {
        "epoch": state.epoch,
        "total_flos": state.total_flos,
        "train_loss": state.loss_sum / max(state.step, 1),
        **speed("train", state.train_runtime_s, state.num_samples, state.step),
        **_token_figures(run.output, state),
    }


def _token_figures(output: OutputConfig, state: TrainState) -> dict[str, float]:
    """What include_num_input_tokens_seen and include_effective_tokens_per_second add to the results."""
    figures: dict[str, float] = {}
    if output.include_num_input_tokens_seen not in (False, "no"):
        figures["num_input_tokens_seen"] = float(state.num_tokens)
    if output.include_effective_tokens_per_second:
        figures["effective_tokens_per_sec"] = state.num_tokens / max(state.train_runtime_s, 1e-9)
    return figures


def run_facts(parts: Parts, source: SampleSource, budget: Budget) -> dict[str, Any]:
    """What a resumed run must find as it was, for its position in the data to mean the same."""
    training = parts.run.training
    return {
        "samples_per_step": budget.samples_per_step,
        "num_samples": len(source),
        "data": parts.data.fingerprint,
        "seed": training.seed,
        "data_seed": training.data_seed,
        "shuffle": not training.disable_shuffling,
    }


def build_loop(
    parts: Parts,
    source: SampleSource,
    budget: Budget,
    state: TrainState,
    trackers: list[Tracker],
    facts: dict[str, Any],
) -> tuple[Loop, Checkpointer]:
    """The loop with everything it needs, and what saves and restores it."""
    run, training, output = parts.run, parts.run.training, parts.run.output
    groups = parameter_groups(parts.module, training, run.tuning)
    optimizer = _build_optimizer(parts, groups)
    scheduler = make_scheduler(training, optimizer, budget)
    scaler = torch.amp.GradScaler(parts.device.type) if parts.precision.loss_scaling else None
    step, policy = parts.step(scaler), parts.policy
    seed = training.seed if training.data_seed is None else training.data_seed
    checkpointer = Checkpointer(
        output_dir=parts.output_dir,
        module=parts.module,
        tokenizer=parts.tokenizer,
        optimizer=optimizer,
        scheduler=scheduler,
        scaler=scaler,
        state=state,
        facts=facts,
        base=parts.base,
        only_model=output.save_only_model,
        limit=output.save_total_limit,
    )
    evaluator = None
    if parts.data.eval:
        evaluator = Evaluator(parts.module, step, parts.data.eval, policy, training.per_device_eval_batch_size)
    loop = Loop(
        settings=_settings(parts, budget),
        step=step,
        module=parts.module,
        loader=StepLoader(source, budget.samples_per_step, seed=seed, shuffle=not training.disable_shuffling),
        policy=policy,
        optimizer=optimizer,
        scheduler=scheduler,
        state=state,
        trackers=trackers,
        save=checkpointer.save,
        begin_micro_batch=parts.begin_micro_batch,
        scaler=scaler,
        evaluator=evaluator,
    )
    return loop, checkpointer


def _build_optimizer(parts: Parts, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    training = parts.run.training
    try:
        return registry.load(_OPTIMIZERS, training.optim, key="optim").build(groups, parts.module, parts.run)
    except TypeError as error:
        raise ConfigError(f"optim_args: {training.optim} does not take it ({error}). Check its settings.") from error


def _settings(parts: Parts, budget: Budget) -> LoopSettings:
    training, output = parts.run.training, parts.run.output
    metric = training.metric_for_best_model or "loss"
    logging = cadence(output.logging_strategy, output.logging_steps, budget)
    evaluation = cadence(training.eval_strategy, training.eval_steps or output.logging_steps, budget)
    return LoopSettings(
        max_steps=budget.max_steps,
        steps_per_epoch=budget.steps_per_epoch,
        max_grad_norm=training.max_grad_norm,
        logging=Cadence(logging.every, logging.at_end, at_first=output.logging_first_step),
        evaluation=replace(evaluation, after=_delay(training, budget)),
        saving=cadence(output.save_strategy, output.save_steps, budget),
        evaluate_first=training.eval_on_start,
        save_best=output.save_strategy == "best" or training.load_best_model_at_end,
        # Transformers' Trainer counts 6 operations per token and parameter outside the embeddings.
        flos_per_token=6.0 * base_model(parts.module).num_parameters(exclude_embeddings=True),
        early_stopping=training.early_stopping_steps,
        metric=metric if metric.startswith("eval_") else f"eval_{metric}",
        greater_is_better=not metric.endswith("loss")
        if training.greater_is_better is None
        else training.greater_is_better,
    )


def _delay(training: TrainingConfig, budget: Budget) -> int:
    """Steps before the first evaluation; `eval_delay` counts epochs where evaluation is by epoch."""
    unit = budget.steps_per_epoch if training.eval_strategy == "epoch" else 1
    return int(training.eval_delay * unit)


def _announce(parts: Parts, budget: Budget, num_samples: int, state: TrainState) -> None:
    """The block that tells what is about to run, in the terms Transformers' users know."""
    training = parts.run.training
    policy = parts.policy
    how = "packed end to end" if policy.packed else "padded"
    epochs = f"Num epochs = {training.num_train_epochs:g}"
    lines = [
        "***** Running training *****",
        f"  Num examples = {format_count(num_samples)}",
        f"  {epochs if training.max_steps <= 0 else f'Max steps = {training.max_steps}'}",
        f"  Samples per optimizer step = {budget.samples_per_step}, {how} in micro-batches of up to "
        f"{format_count(policy.max_tokens)} tokens",
        f"  Total optimization steps = {format_count(budget.max_steps)}",
    ]
    if state.step:
        lines.append(f"  Continuing at step {state.step}")
    for line in lines:
        log.info(line)
