"""Loading what a run is made of: tokenizer, data, model, objective; in the order that fails earliest."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fourfold.base import registry
from fourfold.base.errors import ModelError, PlanError
from fourfold.base.log import get_logger, told_elsewhere
from fourfold.base.start_clock import StartClock
from fourfold.base.units import format_bytes
from fourfold.config.schema import Run
from fourfold.config.second import teacher_run
from fourfold.dataset.collate import CutPolicy, filler
from fourfold.dataset.encoded import ROLES
from fourfold.dataset.prepare import Prepared, encode_settings, prepare
from fourfold.dataset.render import Renderer
from fourfold.dataset.stage_rows import row_kind
from fourfold.models.adapters import attach, identify_base
from fourfold.models.document_rows import has_mixers
from fourfold.models.identity import BaseIdentity
from fourfold.models.liger import apply_liger
from fourfold.models.load import load_model, load_streamed
from fourfold.models.parameters import describe_parameters
from fourfold.models.renderer import load_renderer
from fourfold.models.stream import Stream
from fourfold.models.unwrap import TunedModel, base_model
from fourfold.models.value_head import add_value_head, learns_level, reads_logits, reads_values
from fourfold.objectives.interface import Objective
from fourfold.parallel.apply import Parallelized, no_weights
from fourfold.parallel.mesh import Mesh
from fourfold.parallel.recompute import Recompute
from fourfold.parallel.step import Step
from fourfold.planning.job import RECOMPUTES
from fourfold.planning.keeps import Keeps
from fourfold.planning.predictor import Form
from fourfold.training.build import Built, build
from fourfold.training.evaluate import Evaluator
from fourfold.training.fast import NOTHING_FAST, wished
from fourfold.training.host_speed import with_this_host
from fourfold.training.memory import fit_to_memory
from fourfold.training.outlook import Outlook, cluster_of_job
from fourfold.training.precision import Precision, resolve, warn_of_slow
from fourfold.training.randomness import seed_everything, seed_micro_batch
from fourfold.training.ranks import prepare_alike
from fourfold.training.resumed import check_base
from fourfold.training.schedule import plan_steps, samples_per_step
from fourfold.training.step_sizes import StepSizes
from fourfold.training.teacher import LoadedTeacher, check_teacher, load_teacher

log = get_logger(__name__)

_OBJECTIVES = "fourfold.objectives"
_CPU_TOKENS = (256, 512)
"""Positions of a micro-batch on a CPU: fewer are slower, more are no faster."""
_LEAST_SHARED = 16
"""Tokens of a prompt that both answers of a pair see; of fewer each has its own."""


@dataclass
class Parts:
    """What a run is made of once everything is loaded.

    Attributes:
        built: the model on its rank.
        base: which model the training begins from; None without a training, and where that cannot be told.
        recompute: what the backward pass computes again, but in layers that are spared; settled with `policy`.
        planned: what the planner chose the layout with; None where it did not.
        teacher: the second model of stage kd.
        clock: tells how long the start took, once the first step is done.
    """

    run: Run
    output_dir: Path
    tokenizer: PreTrainedTokenizerBase
    renderer: Renderer
    data: Prepared
    objective: Objective
    built: Built
    base: BaseIdentity | None = None
    recompute: Recompute = "none"
    planned: Form | None = None
    teacher: LoadedTeacher | None = None
    clock: StartClock = field(default_factory=StartClock)

    @property
    def module(self) -> TunedModel:
        """The model as it is trained and saved, possibly wrapped by PEFT."""
        return self.built.module

    @property
    def mesh(self) -> Mesh:
        """This rank's place in the job."""
        return self.built.mesh

    @property
    def split(self) -> Parallelized:
        """How the model is spread over the mesh."""
        return self.built.split

    def step(self, scaler: torch.amp.GradScaler | None = None) -> Step:
        """The engine that runs forward and backward."""
        step = self.built.step(self.objective, lambda: filler(self.policy), scaler)
        return replace(step, teacher=self.teacher)

    def evaluator(self) -> Evaluator:
        """What evaluates the model on the evaluation sets."""
        batch_size = self.run.training.per_device_eval_batch_size
        return Evaluator(self.module, self.step(), self.data.eval, self.policy, batch_size, self.mesh)

    def begin_micro_batch(self, step: int, number: int) -> None:
        """Key all randomness of one micro-batch of one step."""
        self.built.noise.step = step
        seed_micro_batch(self.run.training.seed, step, number)

    @cached_property
    def policy(self) -> CutPolicy:
        """How a step is cut: by tokens, up to what the user's own batch size and cutoff allow and memory holds.

        Decided once, and activations are recomputed from then on if it takes that.
        """
        training, sizes = self.run.training, self.sizes()
        kind, longest = row_kind(training.stage), self.run.data.cutoff_len
        if kind == "prompt":
            longest += self.run.generation.max_new_tokens
        roles = 1 if kind == "prompt" else len(ROLES[kind])
        tokens = training.per_device_train_batch_size * roles * longest
        if self.mesh.device.type == "cpu":
            # What the user's own micro-batch takes at its longest: no more memory than it was meant to need.
            fewest, most = _CPU_TOKENS
            tokens = min(max(training.per_device_train_batch_size * sizes.longest, fewest), most)
        allowed = CutPolicy(
            packed=self.built.model.packed,
            max_tokens=training.micro_batch_tokens or tokens,
            pad_token_id=pad_token(self.tokenizer),
            apart=not self.built.model.keeps_rows_apart,
            multiple=self.built.multiple,
            min_batches=self.split.min_batches,
            shares_prompts=self._shares_prompts(),
        )
        fit = fit_to_memory(
            allowed,
            self.module,
            sizes,
            self._asked_recompute(),
            device=self.mesh.device,
            outlook=self.outlook,
            planned=self.planned,
            spares=self.built.spares_layers and not self.run.parallel.offload_activations,
        )
        # Ranks that share micro-batches must cut and recompute alike, whatever each has free.
        largest = self.split.reducer.largest
        spared = -largest(-fit.keeps.spared)
        if spared < fit.keeps.spared:
            log.info("Other ranks have less room: nothing is computed again in %d layers", spared)
        self.recompute = self.built.recompute(RECOMPUTES[largest(RECOMPUTES.index(fit.recompute))], spared)
        if self.outlook is not None:
            self._keep(self.outlook, replace(fit.keeps, spared=spared))
            if self.outlook.joins_gradients(self.recompute, sizes.largest_micro_batch(fit.policy.max_tokens)):
                self.built.join_gradients()
        return replace(fit.policy, max_tokens=-largest(-fit.policy.max_tokens))

    def _keep(self, outlook: Outlook, keeps: Keeps) -> None:
        """Keep what there is room for; what is expected of the run changes with it."""
        self.outlook = outlook.keeping(keeps)
        if keeps.unpacked:
            log.info(
                "The %d matrices of 4 bits are unpacked once and kept, %s more, since there is room: their numbers are "
                "the same, and steps are faster (memory: low leaves them packed)",
                self.built.keep_unpacked(self.run),
                format_bytes(self.outlook.loaded() - outlook.loaded()),
            )
            torch.cuda.empty_cache()  # what the packed ones leave is in pieces too small for anything else
        if keeps.logits:
            self.built.model.keep_logits = True
            log.info("Logits are kept for the backward pass, since there is room")
        if keeps.copies:
            log.info(
                "Copies of weights in 16 bits are kept from step to step, %s, since there is room",
                format_bytes(self.built.keep_copies()),
            )

    def _shares_prompts(self) -> int:
        """From how many tokens on the answers of a pair see one prompt, 0 for never: rows must be whole, and nothing
        keyed by position and answer (dropout, noise), which would depend on it."""
        keyed = self.built.noise.salts > 0
        # the one kernel of theirs has no windows over keys that others see as well
        capped = self.built.model.reaches and self.built.model.caps_scores
        recurrent = has_mixers(base_model(self.built.module))  # a state knows one answer alone
        unable = keyed or capped or recurrent
        shares = self.run.training.stage == "dpo" and self.mesh.layout.cp == 1 and not unable
        return _LEAST_SHARED if shares else 0

    @cached_property
    def outlook(self) -> Outlook | None:
        """What the planner can tell of this run; None on CPUs, and where its model or GPUs are not known to it."""
        layout = self.mesh.layout
        try:
            cluster = cluster_of_job(self.run, layout.world_size)
            if cluster is None:
                return None
            return Outlook.of(
                self.run,
                self.module,
                layout,
                with_this_host(cluster, self.mesh.device),
                self.sizes(),
                packed=self.built.model.packed,
                document=self._mean_document(),
                pp_rank=self.mesh.index("pp"),
                engine=self.built.fast.engine,
            )
        except (ModelError, PlanError) as error:
            log.info("Memory and time are not predicted, and steps are not fitted to the memory: %s", error)
            return None

    def _mean_document(self) -> float:
        """Tokens that attention sees together, on average."""
        data, cutoff_len = self.data.train, self.run.data.cutoff_len
        if data is None or not len(data.lengths):
            return cutoff_len
        packed = encode_settings(self.run).packing
        return float((data.document_lengths() if packed else data.lengths).mean())

    def sizes(self) -> StepSizes:
        """Tokens of samples and steps on a data-parallel rank."""
        cutoff_len, dp = self.run.data.cutoff_len, self.mesh.layout.dp
        samples = -(-samples_per_step(self.run.training, dp) // dp)
        if row_kind(self.run.training.stage) == "prompt":  # answers are as long as may be
            copies = self.run.reinforcement.num_generations if self.run.training.stage == "grpo" else 1
            return StepSizes.at_most(cutoff_len + self.run.generation.max_new_tokens, samples * copies)
        if self.data.stream is not None:
            return StepSizes.at_most(cutoff_len, samples)
        lengths = None if self.data.train is None else self.data.train.lengths
        if lengths is None or not len(lengths):
            return StepSizes.at_most(cutoff_len, 1)
        return StepSizes.of(lengths, samples, padded=not self.built.model.packed)

    def _asked_recompute(self) -> Recompute | None:
        """The user's word, by either key; None leaves the choice to what fits."""
        asked, on = self.run.parallel.recompute, self.run.training.gradient_checkpointing
        if asked != "auto":
            return asked
        if on is None and self.run.parallel.offload_activations and self.mesh.device.type == "cuda":
            return "full"  # so that one tensor a layer travels
        return None if on is None else "full" if on else "none"


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills padded positions; any will do, since nothing looks at them."""
    token = tokenizer.pad_token_id
    return token if isinstance(token, int) else 0


def load_parts(
    run: Run,
    output_dir: Path,
    mesh: Mesh,
    clock: StartClock | None = None,
    *,
    data_told: bool = False,
    planned: Form | None = None,
) -> Parts:
    """Load tokenizer, then data, then model: what can be wrong with a file is found before the weights are read.

    Args:
        clock: is told when data and model are there; None starts one.
        data_told: the process that started this one has told what there is to tell of tokenizer and data.
        planned: what the planner chose the layout with.
    """
    training, clock = run.training, clock or StartClock()
    seed_everything(training.seed, deterministic=training.full_determinism)
    if training.tf32 is not None:
        torch.set_float32_matmul_precision("high" if training.tf32 else "highest")
    objective: Objective = registry.load(_OBJECTIVES, training.stage, key="stage").build(run)
    with told_elsewhere(data_told or mesh.rank != 0):
        tokenizer, renderer = load_renderer(run)
        data = prepare_alike(partial(prepare, run, tokenizer, renderer))
        taught = teacher_run(run)
        packs = taught is None or check_teacher(run, taught, tokenizer)
    clock.lap("data")
    check_base(run, output_dir)
    precision = resolve(run)
    if mesh.rank == 0:
        warn_of_slow(run, precision, mesh.device)
    log.info("Device: %s, compute dtype: %s", mesh.device, str(precision.compute).removeprefix("torch."))
    module, stream = _load_module(run, precision, mesh, tokenizer)
    _check_context(module, data)
    fill = no_weights
    if stream is not None:
        fill = partial(stream.fill, module, mesh.device, on_host=mesh.layout.offload == "params")
    num_samples = 0 if data.train is None else len(data.train)
    wishes = NOTHING_FAST
    if training.do_train:
        wishes = wished(run, plan_steps(training, num_samples, mesh.layout.dp).max_steps)
    built = build(run, precision, mesh, module, fill, packs=packs, wishes=wishes)
    teacher = None if taught is None else load_teacher(taught, built, tokenizer)
    base = identify_base(run.model, run.tuning) if training.do_train else None
    clock.lap("model")
    return Parts(
        run,
        output_dir,
        tokenizer,
        renderer,
        data,
        objective,
        built,
        base,
        planned=planned,
        teacher=teacher,
        clock=clock,
    )


def _check_context(module: TunedModel, data: Prepared) -> None:
    """Warn of training samples that are longer than the model's context."""
    context = base_model(module).config.get_text_config().to_dict().get("max_position_embeddings")
    if context is None or data.train is None or data.train.lengths.max(initial=0) <= context:
        return
    longest = int(data.train.document_lengths().max())  # of a pack, whose positions restart, each sample counts alone
    if longest > context:
        log.warning(
            "cutoff_len: the longest sample has %d tokens, but the model has %d positions. Use cutoff_len: %d, or "
            "stretch the positions with rope_scaling.",
            longest,
            context,
            context,
        )


def _load_module(
    run: Run, precision: Precision, mesh: Mesh, tokenizer: PreTrainedTokenizerBase
) -> tuple[TunedModel, Stream | None]:
    """The model with its adapters, ready to be split and trained.

    Returns:
        the model on the device, and None; or, where ranks share it, perhaps without weights, and what reads them.
    """
    model, stream = _load_base(run, precision, mesh, tokenizer)
    if run.model.enable_liger_kernel:
        apply_liger(model)
    if run.model.moe_aux_loss_coef and "output_router_logits" not in model.config.to_dict():
        log.warning(
            "moe_aux_loss_coef: this %s model has no experts to balance, so it has no effect. Remove it.",
            model.config.model_type,
        )
    stage = run.training.stage
    module = attach(
        model,
        run.model,
        run.tuning,
        trainable=True,
        master_dtype=precision.master,
        reads_logits=reads_logits(stage),
    )
    if reads_values(stage):
        add_value_head(
            module,
            run.model,
            seed=run.training.seed,
            dtype=precision.master or precision.load,
            trains_bias=learns_level(stage),
            required=stage == "rm" and not run.training.do_train,
        )
    log.info(describe_parameters(module))
    return module, stream


def _load_base(
    run: Run, precision: Precision, mesh: Mesh, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreTrainedModel, Stream | None]:
    dtype, seq_len = precision.load, run.data.cutoff_len
    if mesh.layout.splits_model:
        streamed = load_streamed(run.model, run.tuning, dtype=dtype, tokenizer=tokenizer, seq_len=seq_len)
        if streamed is not None:
            return streamed
    return load_model(run.model, dtype=dtype, device=mesh.device, tokenizer=tokenizer, seq_len=seq_len), None
