"""Loading what a run is made of: tokenizer, data, model, objective; in the order that fails earliest."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from fourfold.base import registry
from fourfold.base.log import get_logger
from fourfold.config.schema import Run
from fourfold.dataset.collate import CutPolicy
from fourfold.dataset.prepare import Prepared, prepare
from fourfold.dataset.render import Renderer, load_template
from fourfold.models.adapters import attach, describe_parameters
from fourfold.models.forward import StepModel, supports_packing
from fourfold.models.load import load_model
from fourfold.models.tokenizer import load_tokenizer
from fourfold.objectives.interface import Objective
from fourfold.parallel.step import Step
from fourfold.planning.layout import Layout
from fourfold.training.precision import Precision, resolve
from fourfold.training.randomness import seed_everything

log = get_logger(__name__)

_OBJECTIVES = "fourfold.objectives"
_CPU_TOKENS = 1024
"""Positions of a micro-batch on a CPU: enough to fill its matrix units, small enough to stay in its caches."""


@dataclass
class Parts:
    """What a run is made of once everything is loaded.

    Attributes:
        module: the model as it is trained and saved, possibly wrapped by PEFT.
    """

    run: Run
    output_dir: Path
    device: torch.device
    precision: Precision
    tokenizer: PreTrainedTokenizerBase
    renderer: Renderer
    data: Prepared
    module: nn.Module
    objective: Objective
    layout: Layout = field(default_factory=Layout)

    def step(self, scaler: torch.amp.GradScaler | None = None) -> Step:
        """The engine that runs forward and backward."""
        return Step(
            model=StepModel(self.module, packed=supports_packing(self.module)),
            objective=self.objective,
            device=self.device,
            autocast=self.precision.autocast(self.device),
            scale=None if scaler is None else scaler.scale,
        )

    def cut_policy(self) -> CutPolicy:
        """How a step is cut: by tokens, up to what the user's own batch size and cutoff would allow."""
        training = self.run.training
        tokens = training.per_device_train_batch_size * self.run.data.cutoff_len
        if self.device.type == "cpu":
            tokens = min(tokens, _CPU_TOKENS)
        return CutPolicy(
            packed=supports_packing(self.module),
            max_tokens=training.micro_batch_tokens or tokens,
            pad_token_id=self.tokenizer.pad_token_id or 0,
        )


def pick_device(run: Run) -> torch.device:
    """The first CUDA device, or the CPU when there is none or `use_cpu` says so."""
    if torch.cuda.is_available() and not run.training.use_cpu:
        return torch.device("cuda", 0)
    return torch.device("cpu")


def load_parts(run: Run, output_dir: Path) -> Parts:
    """Load tokenizer, then data, then model: what can be wrong with a file is found before the weights are read."""
    training = run.training
    seed_everything(training.seed, deterministic=training.full_determinism)
    objective: Objective = registry.load(_OBJECTIVES, training.stage, key="stage").build(run)
    tokenizer = load_tokenizer(run.model)
    renderer = Renderer(
        load_template(run.data.template, tokenizer),
        tokenizer,
        tool_format=run.data.tool_format,
        default_system=run.data.default_system,
        enable_thinking=run.data.enable_thinking,
        preserve_thinking=run.data.preserve_thinking,
    )
    data = prepare(run, tokenizer, renderer)
    device = pick_device(run)
    precision = resolve(run)
    log.info("Device: %s, compute dtype: %s", device, str(precision.compute).removeprefix("torch."))
    model = load_model(run.model, dtype=precision.load, device=device)
    module = attach(model, run.model, run.tuning, trainable=True, master_dtype=precision.master)
    log.info(describe_parameters(module))
    return Parts(run, output_dir, device, precision, tokenizer, renderer, data, module, objective)
