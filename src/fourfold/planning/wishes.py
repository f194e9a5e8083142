"""What a config leaves no choice about: sizes and strategy that it gives, and axes that its other keys rule out.

The reasons are those of the engine (training/machines.py), told here before there is a model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from fourfold.config.parallel import ParallelConfig
from fourfold.config.schema import Run
from fourfold.families.shared_positions import CHANGING_ROTATION
from fourfold.families.tensor_styles import TENSOR_FAMILIES
from fourfold.planning.engines import wants_compiled
from fourfold.planning.job import RECOMPUTES, Job, Recompute
from fourfold.planning.layout import Layout
from fourfold.planning.shape import ModelShape

_WHOLE_STATE = {
    "adamw_8bit": "quantises its state in blocks, which shards would cut",
    "adafactor": "keeps the state of whole rows and columns, which shards would cut",
}


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a search may not change.

    Attributes:
        parallel: the strategy, sizes and settings; what was not given there is free.
        recomputes: kinds that may be used, least work first.
        per_rank: sequences of a step on each data-parallel rank; None where the job's number is of all ranks.
        ruled_out: axis -> why the run's other keys rule it out.
        compiles, replays: whether layers may be compiled, and micro-batches replayed as graphs.
        compiles_by_default: they are, since the run is taken to be a long one.
    """

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    recomputes: tuple[Recompute, ...] = RECOMPUTES
    per_rank: int | None = None
    ruled_out: dict[str, str] = field(default_factory=dict, hash=False)
    compiles: bool = False
    replays: bool = False
    compiles_by_default: bool = False

    @classmethod
    def of(cls, run: Run) -> Wishes:
        """What a run's config fixes."""
        training = run.training
        per_rank = training.per_device_train_batch_size * training.gradient_accumulation_steps
        return cls(
            parallel=run.parallel,
            recomputes=_recomputes(run),
            per_rank=None if training.global_batch_size else per_rank,
            ruled_out=dict(_ruled_out(run)),
            compiles=_compiles(run),
            replays=run.training.cuda_graphs is not False,
            compiles_by_default=training.torch_compile is None and training.max_steps <= 0 and not training.fp8,
        )

    def is_given(self, name: str) -> bool:
        """Whether the config has this key of the layout."""
        return name in self.parallel.model_fields_set

    def job_of(self, job: Job, layout: Layout) -> Job:
        """The job as a layout runs it: more data-parallel ranks may mean more sequences in a step."""
        return job if self.per_rank is None else replace(job, sequences_per_step=self.per_rank * layout.dp)


def obstacles(shape: ModelShape, job: Job, wishes: Wishes) -> dict[str, str]:
    """Axis -> why it cannot be used at all for this model and job, whatever its size."""
    found: dict[str, str] = {}
    if shape.family not in TENSOR_FAMILIES:
        found["tp"] = f"{shape.family} models are not among the families that are tested with shared matrices"
    elif not any(weight.cut is not None and weight.is_matrix for kind in shape.kinds for weight in kind.weights):
        found["tp"] = f"Transformers has no plan of how to share the matrices of {shape.family} models"
    found |= dict(shape.refused)
    if job.tuning == "freeze":
        found["pp"] = "freeze trains nothing in the first layers, and a stage needs something to train"
    if not shape.experts:
        found["ep"] = "the model is dense: it has no experts to share"
    if job.optim in _WHOLE_STATE:
        reason = f"optim: {job.optim} {_WHOLE_STATE[job.optim]}"
        found |= {"tp": reason, "dp_shard": reason, "ep": reason}
    if job.optim == "muon":
        found["tp"] = "optim: muon needs whole matrices"
    return {**found, **wishes.ruled_out}


def _recomputes(run: Run) -> tuple[Recompute, ...]:
    asked, on = run.parallel.recompute, run.training.gradient_checkpointing
    if asked != "auto":
        return (asked,)
    if on is None:
        return ("full",) if run.parallel.offload_activations else RECOMPUTES
    return ("full",) if on else ("none",)


def _compiles(run: Run) -> bool:
    """Whether a run's keys let its layers be compiled, as far as they tell; a run of unknown length is a long one."""
    training, tuning, model = run.training, run.tuning, run.model
    wanted = wants_compiled(training, training.max_steps if training.max_steps > 0 else None)
    other = tuning.use_dora or run.parallel.offload_activations or model.quantization_bit == 8
    return wanted and not other


def _ruled_out(run: Run) -> Iterator[tuple[str, str]]:
    tuning, model = run.tuning, run.model
    whole = {
        "use_dora": tuning.use_dora,
        "additional_target": bool(tuning.additional_target),
        "resize_vocab": model.resize_vocab,
        "quantization_bit: 8": model.quantization_bit == 8,
        "pissa_init": tuning.pissa_init,
    }
    for key, given in whole.items():
        if given:
            yield "tp", f"{key} does not go with shared matrices"
    if tuning.pissa_init:
        yield "dp_shard", "pissa_init does not work with sharded adapters"
        yield "ep", "pissa_init does not work with sharded adapters"
        yield "pp", "pissa_init is undone when saving, which needs the whole model"
    if model.rope_scaling == "dynamic":
        yield "cp", CHANGING_ROTATION
