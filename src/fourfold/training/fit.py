"""Putting the loop together: optimizer, schedule, checkpoints and trackers around the loaded parts."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fourfold.base import registry
from fourfold.base.errors import ConfigError
from fourfold.base.log import get_logger
from fourfold.base.units import format_count
from fourfold.checkpoint.resume import find_checkpoint
from fourfold.config.output import OutputConfig
from fourfold.config.schema import Run
from fourfold.config.training import TrainingConfig
from fourfold.dataset.loader import Loader, StepLoader, StreamLoader
from fourfold.dataset.prepare import name_eval
from fourfold.models.groups import parameter_groups
from fourfold.parallel.host_adamw import AdamW
from fourfold.trackers.interface import RunInfo, Tracker, open_trackers
from fourfold.trackers.reports.results import speed
from fourfold.training.assemble import Parts
from fourfold.training.background import Background
from fourfold.training.checkpointer import Checkpointer, shards_checkpoints
from fourfold.training.exhaustion import Place, exhaustion_told
from fourfold.training.forecast import compare, forecast
from fourfold.training.loop import Loop, LoopSettings
from fourfold.training.precision import LossScaler
from fourfold.training.ranks import peak_memory_of_ranks
from fourfold.training.reinforce import build_practice
from fourfold.training.resumed import settings_of
from fourfold.training.schedule import FOLLOW_METRIC, Budget, cadence, make_scheduler, plan_steps
from fourfold.training.state import TrainState

log = get_logger(__name__)

_OPTIMIZERS = "fourfold.training.optimizers"


def fit(parts: Parts) -> dict[str, float]:
    """Train to the end of the budget, and save the result into the run's folder.

    Returns:
        the figures of train_results.json.
    Raises:
        ConfigError: settings that the optimizer, the schedule or the evaluation does not have.
    """
    run, output_dir = parts.run, parts.output_dir
    num_samples = 0 if parts.data.train is None else len(parts.data.train)
    buffer = run.preference.ppo_buffer_size if run.training.stage == "ppo" else 1
    budget = plan_steps(run.training, num_samples, parts.mesh.layout.dp, buffer=buffer)
    facts = run_facts(parts, num_samples, budget)
    resume = run.output.resume_from_checkpoint
    ranks = {"rank": parts.mesh.rank, "num_ranks": parts.mesh.layout.world_size}
    resumed = find_checkpoint(resume, output_dir, **ranks) if resume else None
    if resume and resumed is None:
        log.warning("resume_from_checkpoint: there is no checkpoint in %s, so the run begins anew.", output_dir)
    state = TrainState() if resumed is None else TrainState.load(resumed, facts)
    _announce(parts, budget, num_samples, state)
    name = run.output.run_name or output_dir.name
    info = RunInfo(output_dir, name, budget.max_steps, state.step, run.flat(), _accounts(run))
    trackers = open_trackers(run.output.report_to, info) if parts.mesh.rank == 0 else []
    try:
        loop, checkpointer = build_loop(parts, budget, state, trackers, facts)
        expected = forecast(parts.outlook, parts.sizes(), parts.policy, parts.recompute)
        if resumed is not None:
            checkpointer.restore(resumed)
        try:
            with exhaustion_told(run, parts.mesh, partial(_place, parts, budget, state)):
                loop.fit()
        finally:
            checkpointer.wait()
        if run.training.load_best_model_at_end:
            checkpointer.load_best()
    finally:
        for tracker in trackers:
            tracker.finish()
    checkpointer.save_result()
    return {
        "epoch": state.epoch,
        "total_flos": state.total_flos,
        "train_loss": state.loss_sum / max(state.step, 1),
        **speed("train", state.train_runtime_s, state.num_samples, state.step),
        **_token_figures(run.output, state),
        **peak_memory_of_ranks(parts.mesh),
        **compare(expected, loop.step_times),
    }


def _accounts(run: Run) -> dict[str, str]:
    """The keys of accounts that trackers log in with, by config key."""
    key = run.output.swanlab_api_key
    return {"swanlab_api_key": key} if key else {}


def _place(parts: Parts, budget: Budget, state: TrainState) -> Place:
    """Where the training is."""
    what = f"in step {state.step + 1} of {budget.max_steps}"
    policy = parts.policy  # which settles the rest
    spared = 0 if parts.outlook is None else parts.outlook.job.spared
    return Place(what, policy.max_tokens, parts.sizes().longest, recompute=parts.recompute, spared=spared)


def _token_figures(output: OutputConfig, state: TrainState) -> dict[str, float]:
    """What include_num_input_tokens_seen and include_effective_tokens_per_second add to the results."""
    figures: dict[str, float] = {}
    if output.include_num_input_tokens_seen not in (False, "no"):
        figures["num_input_tokens_seen"] = state.num_tokens
    if output.include_effective_tokens_per_second:
        figures["effective_tokens_per_sec"] = state.num_tokens / max(state.train_runtime_s, 1e-9)
    return figures


def run_facts(parts: Parts, num_samples: int, budget: Budget) -> dict[str, Any]:
    """What a resumed run must find as it was, for its weights and its position in the data to mean the same.

    Args:
        num_samples: samples of the training set, 0 for a stream.
    """
    return {
        "samples_per_step": budget.samples_per_step,
        "num_samples": num_samples,
        "data": parts.data.fingerprint,
        **settings_of(parts.run),
    }


def _shown_settings(parts: Parts, budget: Budget) -> dict[str, Any]:
    """The settings that Transformers' users find in trainer_state.json."""
    training, output = parts.run.training, parts.run.output
    return {
        "max_steps": budget.max_steps,
        "num_train_epochs": budget.num_epochs,
        "train_batch_size": training.per_device_train_batch_size,
        "logging_steps": output.logging_steps,
        "eval_steps": training.eval_steps,
        "save_steps": output.save_steps,
    }


def build_loop(
    parts: Parts,
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
    scaler = LossScaler(parts.mesh.device) if parts.built.precision.loss_scaling else None
    step, policy = parts.step(scaler), parts.policy
    checkpointer = Checkpointer(
        output_dir=parts.output_dir,
        module=parts.module,
        tokenizer=parts.tokenizer,
        optimizer=optimizer,
        scheduler=scheduler,
        scaler=scaler,
        state=state,
        facts=facts,
        settings=_shown_settings(parts, budget),
        mesh=parts.mesh,
        shares=parts.split.shares,
        base=parts.base,
        only_model=output.save_only_model,
        limit=output.save_total_limit,
        sharded=shards_checkpoints(run, parts.module, parts.split.shares, parts.mesh.layout),
        background=Background() if output.async_save and run.tuning.finetuning_type != "lora" else None,
    )
    evaluator = None
    if parts.data.eval:
        evaluator = parts.evaluator()
    loop = Loop(
        settings=_settings(parts, budget),
        step=step,
        module=parts.module,
        loader=_build_loader(parts, budget),
        policy=policy,
        optimizer=optimizer,
        scheduler=scheduler,
        state=state,
        trackers=trackers,
        save=checkpointer.save,
        begin_micro_batch=parts.begin_micro_batch,
        scaler=scaler,
        evaluator=evaluator,
        gradient_norm=parts.split.gradient_norm,
        practice=build_practice(parts, step),
        clock=parts.clock,
    )
    return loop, checkpointer


def _build_loader(parts: Parts, budget: Budget) -> Loader:
    training, data, mesh = parts.run.training, parts.data, parts.mesh
    if data.stream is not None:
        return StreamLoader(data.stream, budget.samples_per_step, rank=mesh.dp_rank, num_ranks=mesh.layout.dp)
    assert data.train is not None
    seed = training.seed if training.data_seed is None else training.data_seed
    return StepLoader(
        data.train,
        budget.samples_per_step,
        seed=seed,
        shuffle=not training.disable_shuffling,
        rank=mesh.dp_rank,
        num_ranks=mesh.layout.dp,
    )


def _build_optimizer(parts: Parts, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    training = parts.run.training
    try:
        if parts.run.parallel.offload != "none" and training.optim == "adamw_torch":
            return host_adamw(groups, parts.run)
        return registry.load(_OPTIMIZERS, training.optim, key="optim").build(groups, parts.module, parts.run)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optim_args: {training.optim} does not take it ({error}). Check its settings.") from error


def host_adamw(groups: list[dict[str, Any]], run: Run) -> AdamW:
    """AdamW on the host, its state in memory or in the files of `parallel.offload_folder`."""
    training, folder = run.training, run.parallel.offload_folder
    settings: dict[str, Any] = {
        "betas": (training.adam_beta1, training.adam_beta2),
        "eps": training.adam_epsilon,
        **training.optim_args,
    }
    where = "host memory" if folder is None else folder
    log.info("The optimizer's state is kept in %s, and updated there", where)
    return AdamW(
        groups,
        lr=training.learning_rate,
        weight_decay=training.weight_decay,
        folder=None if folder is None else Path(folder),
        **settings,
    )


def _settings(parts: Parts, budget: Budget) -> LoopSettings:
    training, output = parts.run.training, parts.run.output
    logging = cadence(output.logging_strategy, output.logging_steps, budget)
    evaluation = cadence(training.eval_strategy, training.eval_steps or output.logging_steps, budget)
    return LoopSettings(
        max_steps=budget.max_steps,
        steps_per_epoch=budget.steps_per_epoch,
        max_grad_norm=training.max_grad_norm,
        # the last step too, so that a run shorter than logging_steps shows a loss
        logging=replace(logging, at_end=logging.every > 0, at_first=output.logging_first_step),
        evaluation=replace(evaluation, after=_delay(training, budget)),
        saving=cadence(output.save_strategy, output.save_steps, budget),
        evaluate_first=training.eval_on_start,
        save_best=output.save_strategy == "best" or training.load_best_model_at_end,
        # Transformers' Trainer counts 6 operations per token and parameter outside the embeddings.
        flos_per_token=6.0 * parts.built.num_parameters,
        early_stopping=training.early_stopping_steps,
        metric=_metric(parts) if _compares(parts.run) else None,
        greater_is_better=_greater_is_better(training),
        schedule_follows_metric=training.lr_scheduler_type in FOLLOW_METRIC,
    )


def _compares(run: Run) -> bool:
    """Whether anything hangs on which evaluation is the best."""
    training, output = run.training, run.output
    if training.eval_strategy == "no":
        return False
    asked = training.load_best_model_at_end or training.early_stopping_steps is not None
    return (
        asked
        or training.lr_scheduler_type in FOLLOW_METRIC
        or output.save_strategy == "best"
        or training.metric_for_best_model is not None
    )


def _metric(parts: Parts) -> str:
    """The figure that tells the best evaluation, as the evaluation names it.

    Raises:
        ConfigError: no evaluation set has it.
    """
    metric = parts.run.training.metric_for_best_model or "loss"
    full = metric if metric.startswith("eval_") else f"eval_{metric}"
    labels = [name_eval(name) for name in parts.data.eval]
    if not any(full.startswith(f"{label}_") for label in labels):
        choices = ", ".join(f"{label}_loss" for label in labels)
        raise ConfigError(f"metric_for_best_model: evaluation gives no {full}. Name one that it gives: {choices}.")
    return full


def _greater_is_better(training: TrainingConfig) -> bool:
    if training.greater_is_better is not None:
        return training.greater_is_better
    return not (training.metric_for_best_model or "loss").endswith("loss")


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
        f"  Num examples = {format_count(num_samples) if num_samples else 'not known, streamed'}",
        f"  {epochs if training.max_steps <= 0 else f'Max steps = {training.max_steps}'}",
        f"  Samples per optimizer step = {budget.samples_per_step}, {how} in micro-batches of up to "
        f"{format_count(policy.max_tokens)} tokens",
        f"  Total optimization steps = {format_count(budget.max_steps)}",
    ]
    if state.step:
        lines.append(f"  Continuing at step {state.step}")
    if state.step >= budget.max_steps:
        lines.append("  Nothing is left to train. To go on, raise num_train_epochs or max_steps.")
    for line in lines:
        log.info(line)
