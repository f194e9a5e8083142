"""Which machines and processes a run uses, and how it is split over them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from fourfold.base.errors import ConfigError, FourfoldError, PlanError
from fourfold.base.log import get_logger
from fourfold.config.schema import NESTED, Run
from fourfold.config.second import teacher_run
from fourfold.generate.rollout import can_roll_out
from fourfold.models.attention import context_obstacles
from fourfold.models.load import count_parameters, load_config
from fourfold.parallel.launch import Machines
from fourfold.parallel.tensor import FAMILIES, not_shared
from fourfold.parallel.whole import everyone
from fourfold.planning.axes import ModelFacts, check_layout
from fourfold.planning.layout import SHARDED, Layout, resolve_layout
from fourfold.planning.predictor import Form
from fourfold.training.auto import plan_auto
from fourfold.training.frozen import layout_of_frozen
from fourfold.training.teacher import named_as_teacher

log = get_logger(__name__)

_SHARE = 0.6
"""Of a device's memory, what weights, gradients and optimizer state of a replica may take; the rest is activations'."""
_BYTES_FULL = 16
"""fp32 weights, gradients and Adam's two moments of a trained parameter."""


def machines_of(run: Run) -> Machines:
    """The processes of a run: `nproc` or one a visible GPU here, and as many on each of NNODES machines.

    NNODES, NODE_RANK, NPROC_PER_NODE, MASTER_ADDR and MASTER_PORT are read as LLaMA-Factory's launcher reads them; one
    that is empty is not given.

    Raises:
        ConfigError: one of them is not such a number.
        PlanError: more processes than GPUs.
    """
    gpus = 0 if run.training.use_cpu else torch.cuda.device_count()
    per_node = run.parallel.nproc or _number("NPROC_PER_NODE", 0) or max(gpus, 1)
    if gpus and per_node > gpus:
        raise PlanError(f"nproc: {per_node} processes need as many GPUs, and {gpus} are visible. Use at most {gpus}.")
    return Machines(
        per_node=per_node,
        num_nodes=_number("NNODES", 1, least=1),
        node_rank=_number("NODE_RANK", 0),
        address=os.environ.get("MASTER_ADDR") or "127.0.0.1",
        port=_number("MASTER_PORT", 0),
    )


def _number(variable: str, default: int, *, least: int = 0) -> int:
    """The whole number that a variable of the environment holds.

    Raises:
        ConfigError: it holds something else, for example torchrun's range of machines (`2:3`).
    """
    text = os.environ.get(variable, "").strip()
    if not text:
        return default
    if text.isdecimal() and int(text) >= least:
        return int(text)
    elastic = " A range is torchrun's: start the workers with torchrun." if ":" in text else ""
    raise ConfigError(
        f"{variable}: {text!r} is not a whole number of at least {least}. Give one, or unset it.{elastic}"
    )


def settle_offload(run: Run, world_size: int) -> Run:
    """The run with what another tool's file means by `parallel.offload: params` where there is one process.

    Such a file (ZeRO 3 with `offload_param`) is often used on one GPU, where nothing is sharded.
    """
    if run.parallel.offload != "params" or world_size > 1 or not _offload_from_file(run):
        return run
    means = "optimizer" if run.training.optim == "adamw_torch" else "none"
    log.info(
        "parallel.offload: params, from another tool's file, works on shards; with one process it is taken for %s.",
        means,
    )
    return replace(run, parallel=run.parallel.model_copy(update={"offload": means}))


def _offload_from_file(run: Run) -> bool:
    """Whether the offload is not the user's own word, but that of a DeepSpeed or accelerate file."""
    given = run.source.get(NESTED)
    return not (isinstance(given, Mapping) and "offload" in given)


@dataclass(frozen=True, slots=True)
class Choice:
    """How a run is split.

    Attributes:
        planned: the recompute and the micro-batch that the planner chose the layout with; None where it did not.
    """

    layout: Layout
    planned: Form | None = None


def choose(run: Run, world_size: int) -> Choice:
    """How a run is split over so many ranks: as its strategy and sizes say; for `auto` on GPUs, as the planner says.

    Raises:
        PlanError: every problem of the layout with the model, the optimizer and the precision.
    """
    layout, planned = resolve_layout(run.parallel, world_size), None
    if run.parallel.strategy == "auto" and world_size > 1:
        planned = plan_auto(run, world_size, lambda found: not _problems(run, found))
        if planned is not None:
            layout = planned.layout
        elif layout.dp_replicate == world_size and not _replica_fits(run):
            layout = replace(layout, dp_replicate=1, dp_shard=world_size)
    problems = _problems(run, layout)
    if problems:
        raise PlanError("\n".join(problems))
    if layout.world_size > 1 and not _is_used(run.parallel.strategy, layout):
        log.info(
            "strategy: %s has nothing left to split: the sizes under parallel take all %d processes (%s).",
            run.parallel.strategy,
            layout.world_size,
            layout.describe(),
        )
    return Choice(layout, planned)


def _is_used(strategy: str, layout: Layout) -> bool:
    """Whether a layout has what its strategy is named after."""
    ranks = {"ddp": layout.dp_replicate, "hsdp": layout.dp_shard, "tp": layout.tp, "pp": layout.pp}
    sharded = dict.fromkeys(SHARDED, layout.shards)
    return (ranks | sharded).get(strategy, layout.world_size) > 1


def choose_layout(run: Run, world_size: int) -> Layout:
    """The layout that `choose` chooses.

    Raises:
        PlanError: as there.
    """
    return choose(run, world_size).layout


def agree(run: Run, mine: Choice | None) -> Choice:
    """Rank 0's choice, on every rank of a job, whatever each would choose on its machine; every rank must call.

    Args:
        mine: what the process that started this one has chosen; None if a launcher did.
    Raises:
        FourfoldError: on every rank, what rank 0 found wrong.
    """
    found: Choice | FourfoldError | None = mine
    if mine is None and dist.get_rank() == 0:
        try:
            found = choose(run, dist.get_world_size())
        except FourfoldError as error:
            found = error
    first = everyone(found)[0]
    if isinstance(first, FourfoldError):
        raise first
    assert isinstance(first, Choice)
    return first


def _problems(run: Run, layout: Layout) -> list[str]:
    """Why a layout cannot be used."""
    if layout.world_size == 1:
        return _not_yet(run, layout)
    return [*check_layout(layout, _facts(run)), *_not_yet(run, layout), *_teacher_problems(run, layout)]


def _teacher_problems(run: Run, layout: Layout) -> list[str]:
    """Why a layout cannot be used for the teacher of a run that has one."""
    teacher = teacher_run(run)
    if teacher is None:
        return []
    with named_as_teacher():
        facts = _facts(teacher)
    found = layout_of_frozen(layout, has_experts=facts.experts > 0)
    problems = check_layout(found, facts)
    if layout.tp > 1:
        problems += _tensor_problems(teacher)
    if layout.cp > 1:
        problems += _context_problems(teacher, layout)
    return [f"teacher_model: cannot be split so: {problem}" for problem in problems]


def _facts(run: Run) -> ModelFacts:
    config = load_config(run.model).get_text_config()
    entries = config.to_dict()
    heads = config.num_attention_heads
    names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    experts = next((entries[key] for key in names if entries.get(key)), 0)
    return ModelFacts(
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=entries.get("num_key_value_heads") or heads,
        intermediate=entries.get("intermediate_size") or 4 * config.hidden_size,
        experts=experts,
    )


def _replica_fits(run: Run) -> bool:
    """Whether one device holds the whole training state; a CPU's memory is not judged."""
    if run.training.use_cpu or not torch.cuda.is_available():
        return True
    weights = 4.5 / 8 if run.model.quantization_bit == 4 else 2
    full = _BYTES_FULL if run.parallel.offload == "none" else _BYTES_FULL // 2
    per_parameter = full if run.tuning.finetuning_type == "full" else weights
    total = min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
    beside = 0.0
    if (teacher := teacher_run(run)) is not None:
        beside = count_parameters(teacher.model) * (2 if teacher.model.quantization_bit is None else 4.5 / 8)
    return count_parameters(run.model) * per_parameter + beside <= _SHARE * total


def _tensor_problems(run: Run) -> list[str]:
    """What cannot be trained on shared matrices."""
    tuning, model = run.tuning, run.model
    asked = {
        "use_dora": (tuning.use_dora, "Use plain LoRA"),
        "pissa_init": (tuning.pissa_init, "Use plain LoRA"),
        "additional_target": (bool(tuning.additional_target), "Leave it out"),
        "resize_vocab": (model.resize_vocab, "Resize and save the model in a run of its own first"),
        "quantization_bit": (model.quantization_bit == 8, "Use quantization_bit: 4"),
    }
    problems = [f"parallel.tp: does not go with {key}. {what}." for key, (given, what) in asked.items() if given]
    model_type = load_config(model).get_text_config().model_type
    if model_type not in FAMILIES:
        problems.append(not_shared(model_type))
    return problems


def _not_yet(run: Run, layout: Layout) -> list[str]:
    """What this version cannot split."""
    problems: list[str] = []
    if layout.pp > 1:
        problems += _pipeline_problems(run, layout)
    if layout.tp > 1:
        problems += _tensor_problems(run)
    if layout.cp > 1:
        problems += _context_problems(run, layout)
    if layout.shards * layout.tp > 1:
        problems += _optimizer_problems(run.training.optim, layout)
        if run.tuning.pissa_init:
            problems.append("pissa_init: does not work with sharded adapters. Use strategy: ddp.")
    less = "parallel.offload: optimizer"
    if _offload_from_file(run):
        less = "a DeepSpeed file without offload_param (or another tool's without its like)"
    if layout.offload == "params" and layout.shards == 1:
        problems.append(
            f"parallel.offload: params works on shards only. Use strategy: fsdp with several processes, or {less}."
        )
    if layout.offload == "params" and layout.pp > 1:
        problems.append(
            "parallel.offload: params does not go with parallel.pp, which keeps weights gathered for a whole step. Use "
            f"{less}."
        )
    if layout.reshard is True and layout.pp > 1:
        problems.append("parallel.reshard_after_forward: true does not go with parallel.pp. Leave it out.")
    if layout.reshard is True and layout.zero < 3:
        problems.append(
            f"parallel.reshard_after_forward: true frees the weights that strategy: zero{layout.zero} keeps. "
            "Use strategy: zero3."
        )
    if layout.splits_model and run.training.predict_with_generate:
        problems += _prediction_problems(run)
    return problems


def _prediction_problems(run: Run) -> list[str]:
    """Which answers cannot be generated by a model that ranks share."""
    generation = run.generation
    beams = generation.eval_num_beams or generation.num_beams
    if beams > 1:
        key = "eval_num_beams" if generation.eval_num_beams else "num_beams"
        return [f"{key}: {beams} needs the whole model on a rank. Use {key}: 1, or strategy: ddp."]
    config = load_config(run.model)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model_class is not None and not can_roll_out(config, model_class):
        return [
            f"predict_with_generate: a {config.model_type} model must be whole on a rank to answer. Use strategy: ddp, "
            "or predict in a run of its own with nproc: 1."
        ]
    return []


def _pipeline_problems(run: Run, layout: Layout) -> list[str]:
    """What cannot be trained in stages."""
    problems = []
    if layout.pp_schedule == "zbv" and run.parallel.recompute == "selective":
        problems.append(
            "parallel.recompute: selective hands out what it kept once, and zbv computes each layer again twice. "
            "Use recompute: full, or parallel.pp_schedule: 1f1b."
        )
    if run.tuning.pissa_init:
        problems.append("pissa_init: is undone when saving, which needs the whole model. Use plain LoRA.")
    return problems


def _optimizer_problems(optim: str, layout: Layout) -> list[str]:
    """Why an optimizer cannot work on parts of parameters."""
    reasons = {
        "adamw_8bit": "quantises its state in blocks, which shards would cut",
        "adafactor": "keeps the state of whole rows and columns, which shards would cut",
    }
    if layout.tp > 1:
        reasons["muon"] = "needs whole matrices, and parallel.tp shares them"
    if optim not in reasons:
        return []
    return [f"optim: {optim} {reasons[optim]}. Use optim: adamw_torch or sgd, or strategy: ddp."]


def _context_problems(run: Run, layout: Layout) -> list[str]:
    """What cannot be trained with the positions of a row shared by ranks."""
    reasons = list(context_obstacles(load_config(run.model).get_text_config(), layout.cp_method))
    return [f"parallel.cp: {layout.cp} cannot be used: {reason}. Use parallel.cp: 1." for reason in reasons]
