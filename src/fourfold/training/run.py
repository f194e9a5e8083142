"""The verb `train`: from a checked config to a finished run."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import fourfold.base.light_imports  # noqa: F401 - before anything imports Transformers
from fourfold.base.errors import ConfigError
from fourfold.base.log import get_logger
from fourfold.base.start_clock import StartClock
from fourfold.checkpoint.folder import failed_writes_told, list_checkpoints
from fourfold.config.begin import begin_logging
from fourfold.config.schema import Run
from fourfold.config.second import teacher_run
from fourfold.dataset.prepare import prepare
from fourfold.models.renderer import load_renderer
from fourfold.parallel.launch import WorkerError, is_worker, launch
from fourfold.parallel.mesh import (
    Mesh,
    build_mesh,
    local_device,
    single,
    start_process_group,
    stop_process_group,
)
from fourfold.planning.predictor import Form
from fourfold.rewards.build import check_reward_functions
from fourfold.trackers.interface import check_installed
from fourfold.trackers.reports.plot import plot_losses
from fourfold.trackers.reports.results import Split, format_results, read_results, write_results
from fourfold.training import folder
from fourfold.training.assemble import Parts, load_parts
from fourfold.training.exhaustion import Place, exhaustion_told
from fourfold.training.fit import fit
from fourfold.training.machines import Choice, agree, choose, machines_of, settle_offload
from fourfold.training.predict import generate_predictions
from fourfold.training.ranks import RankFacts, compare_ranks
from fourfold.training.reference import add_reference
from fourfold.training.score import score_pairs
from fourfold.training.teacher import check_teacher

log = get_logger(__name__)


def train(run: Run, clock: StartClock | None = None) -> dict[str, Any]:
    """Train, evaluate and predict as `do_train`, `do_eval` and `do_predict` say.

    With several devices, or `nproc`, a worker is started for each; under a launcher such as torchrun this process is
    one of its workers.

    Args:
        clock: runs since the command was given; None starts one.
    Returns:
        the figures of all_results.json.
    Raises:
        FourfoldError: whatever is the user's to settle.
    """
    try:
        return _train(run, clock or StartClock())
    finally:
        folder.release()


def _train(run: Run, clock: StartClock) -> dict[str, Any]:
    """See `train`."""
    check_installed(run.output.report_to)
    check_reward_functions(run)
    if is_worker():
        return _work_in_job(run, None, None, clock)
    machines = machines_of(run)
    run = settle_offload(run, machines.world_size)
    choice = choose(run, machines.world_size)
    if machines.world_size == 1:
        if run.parallel.strategy not in ("auto", "single"):
            log.info("strategy: %s splits nothing, since there is one process.", run.parallel.strategy)
        return _work(run, folder.claim(run), single(local_device(run.training.use_cpu)), clock)
    output_dir = folder.claim(run)
    # Here and not in the workers, so that they find the data tokenised and any fault of it is told once.
    tokenizer, renderer = load_renderer(run)
    prepare(run, tokenizer, renderer)
    teacher = teacher_run(run)
    if teacher is not None:
        check_teacher(run, teacher, tokenizer)
    clock.lap("data")
    log.info("Starting %d workers: %s", machines.per_node, choice.layout.describe())
    fresh = local_device(run.training.use_cpu).type == "cuda" or torch.get_num_threads() > 1
    try:
        launch(partial(_work_in_job, run, output_dir, choice, clock), machines, fresh=fresh)
    except WorkerError as error:
        checkpoints = list_checkpoints(output_dir)
        if not (error.is_sudden and checkpoints):
            raise
        last = f"The last checkpoint is {checkpoints[-1][1]}: go on with resume_from_checkpoint=true."
        raise WorkerError(f"{error} {last}", error.exit_code, is_sudden=True) from error
    return read_results(output_dir)


def _work_in_job(run: Run, output_dir: Path | None, choice: Choice | None, clock: StartClock) -> dict[str, Any]:
    """The part of one rank.

    Args:
        output_dir: already claimed by whoever started the workers; None if nobody has.
        choice: how the run is split, as they see it; None if they have not chosen.
    """
    begin_logging(run)  # a fresh interpreter has none yet
    device = local_device(run.training.use_cpu)
    start_process_group(device, run.parallel.ddp_timeout)
    compare_ranks(RankFacts.of(run, device))
    run = settle_offload(run, dist.get_world_size())
    choice = agree(run, choice)
    mesh = build_mesh(choice.layout, device)
    if output_dir is None and mesh.rank == 0:
        folder.claim(run)
    mesh.wait()
    clock.lap("workers")
    try:
        folder_of_run = Path(run.output.output_dir or "")
        return _work(run, folder_of_run, mesh, clock, data_told=output_dir is not None, planned=choice.planned)
    finally:
        stop_process_group()


def _work(
    run: Run,
    output_dir: Path,
    mesh: Mesh,
    clock: StartClock,
    *,
    data_told: bool = False,
    planned: Form | None = None,
) -> dict[str, Any]:
    """Everything that follows once this rank knows its place."""
    with exhaustion_told(run, mesh, lambda: Place("while the model was loaded")):
        parts = load_parts(run, output_dir, mesh, clock, data_told=data_told, planned=planned)
    _check_data(parts)
    with exhaustion_told(run, mesh, partial(_place_of_reference, parts)):
        add_reference(parts)
    clock.lap("reference")
    with failed_writes_told(output_dir):
        return _verbs(parts)


def _verbs(parts: Parts) -> dict[str, Any]:
    run, output_dir, mesh = parts.run, parts.output_dir, parts.mesh
    first = mesh.rank == 0
    if first:
        folder.begin_anew(output_dir, run)
        folder.record(output_dir, run, parts.data.fingerprints, mesh.layout.as_dict())
    mesh.wait()
    results: dict[str, Any] = {}
    training = run.training
    if training.do_train:
        results |= _report(parts, "train", fit(parts))
        if run.output.plot_loss and first:
            for path in plot_losses(output_dir):
                log.info("Figure saved at %s", path)
        log.info(_what_next(parts))
    with exhaustion_told(run, mesh, partial(_place_of_evaluation, parts)):
        results |= _evaluate(parts)
    return results


def _evaluate(parts: Parts) -> dict[str, Any]:
    """The figures of do_eval and do_predict; answers are generated once for both."""
    training = parts.run.training
    splits: list[Split] = [*(["eval"] if training.do_eval else []), *(["predict"] if training.do_predict else [])]
    answered = generate_predictions(parts) if training.predict_with_generate and splits else {}
    if training.stage == "rm" and training.do_predict:
        score_pairs(parts)
    results: dict[str, Any] = {}
    for split in splits:
        figures = parts.evaluator().run(split)
        for name, found in answered.items():
            label = f"{split}_{name}" if name else split
            figures |= {f"{label}_{key}": value for key, value in found.items()}
        results |= _report(parts, split, figures)
    return results


def _place_of_evaluation(parts: Parts) -> Place:
    generates = parts.run.training.predict_with_generate
    return Place("in the evaluation", parts.policy.max_tokens, parts.sizes().longest, generates=generates)


def _place_of_reference(parts: Parts) -> Place:
    return Place("under the reference model", parts.policy.max_tokens, parts.sizes().longest)


def _what_next(parts: Parts) -> str:
    """Where the result is, and the command that uses it."""
    run, trained = parts.run, str(parts.output_dir)
    keys = {"model_name_or_path": run.model.model_name_or_path or "", "template": parts.renderer.template.name}
    kind = "Model"
    if run.tuning.finetuning_type == "lora":
        given = run.model.adapter_name_or_path
        below = given if run.tuning.create_new_adapter else given[:-1]
        kind, keys["adapter_name_or_path"] = "Adapter", ",".join((*below, trained))
    else:
        keys["model_name_or_path"] = trained
    words = " ".join(f"{key}={shlex.quote(value)}" for key, value in keys.items())
    if run.training.stage == "rm":
        return f"{kind} saved in {trained}. To score with it: fourfold train stage=rm do_predict=true {words} ..."
    return f"{kind} saved in {trained}. To talk to it: fourfold chat {words}"


def _check_data(parts: Parts) -> None:
    """Refuse, before anything is computed, what saved data (tokenized_path) may lack.

    Raises:
        ConfigError: nothing to train or to evaluate on, though the config asks for it.
    """
    run, data = parts.run, parts.data
    if run.training.do_train and data.train is None and data.stream is None:
        raise ConfigError("dataset: there is nothing to train on. Name a data set of dataset_info.json.")
    if (run.training.do_eval or run.training.do_predict) and not data.eval:
        raise ConfigError("eval_dataset: there is nothing to evaluate on. Name a data set, or set val_size.")


def _report(parts: Parts, split: Split, figures: dict[str, float]) -> dict[str, float]:
    if parts.mesh.rank == 0:
        write_results(parts.output_dir, split, figures)
    for line in format_results(split, figures).splitlines():
        log.info(line)
    return figures
