"""A model under a layout with its optimizer, put together by the engine's own functions, without tokenizer and data.

What `fourfold train` does between reading data and its loop; multi_gpu.py does it many times in one process, where the
command would have to start anew.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from fourfold.base import registry
from fourfold.config.schema import Run
from fourfold.dataset.batch import IGNORE_INDEX, Batch, Example, Sample
from fourfold.dataset.collate import CutPolicy, cut, filler
from fourfold.models.adapters import attach
from fourfold.models.blank import blank_model
from fourfold.models.groups import parameter_groups
from fourfold.models.load import load_model, load_streamed
from fourfold.models.unwrap import TunedModel
from fourfold.objectives.interface import Objective
from fourfold.parallel.apply import no_weights
from fourfold.parallel.mesh import Mesh
from fourfold.parallel.recompute import Recompute
from fourfold.parallel.shares import Shares
from fourfold.parallel.step import Step, StepResult
from fourfold.parallel.sums import numbers_of
from fourfold.planning.keeps import NOTHING, Keeps
from fourfold.training.build import Built, build
from fourfold.training.clipping import clip_for
from fourfold.training.fast import Fast
from fourfold.training.precision import resolve

Model = tuple[TunedModel, Callable[[Shares], None]]
"""A model, perhaps without weights, and what gives it those once it is split."""


@dataclass(frozen=True, slots=True)
class Ready:
    """A model that is ready to be trained.

    Attributes:
        policy: how samples are cut into micro-batches.
        parameters: those that are trained on this rank.
    """

    built: Built
    step: Step
    policy: CutPolicy
    optimizer: torch.optim.Optimizer
    parameters: list[nn.Parameter]
    max_grad_norm: float

    def train(self, batches: Sequence[Batch]) -> tuple[StepResult, float]:
        """One optimizer step: its figures and the norm of its gradients before clipping."""
        return self.begin(batches)()

    def begin(self, batches: Sequence[Batch]) -> Callable[[], tuple[StepResult, float]]:
        """Give a step to the device; what is returned waits for what it found, as a run does a step later."""
        self.optimizer.zero_grad(set_to_none=True)
        running = self.step.begin(batches)
        norm = numbers_of([self.update()])
        return lambda: (running.read(), norm()[0])

    def update(self) -> torch.Tensor:
        """Clip the gradients and update the weights; returns the norm."""
        norm = clip_for(self.optimizer, self.parameters, self.max_grad_norm, self.built.split.gradient_norm)
        self.optimizer.step()
        return norm

    def cut(self, samples: Sequence[Sample]) -> list[Batch]:
        """Micro-batches."""
        return cut(samples, self.policy)


def saved_model(run: Run, mesh: Mesh, tokenizer: PreTrainedTokenizerBase) -> Model:
    """The model of a folder with weights, read as a run reads it; adapters are the same under every layout."""
    precision, seq_len = resolve(run), run.data.cutoff_len
    streamed = None
    if mesh.layout.splits_model:
        streamed = load_streamed(run.model, run.tuning, dtype=precision.load, tokenizer=tokenizer, seq_len=seq_len)
    if streamed is None:
        base = load_model(run.model, dtype=precision.load, device=mesh.device, tokenizer=tokenizer, seq_len=seq_len)
    else:
        base = streamed[0]
    torch.manual_seed(run.training.seed)  # of the adapters
    module = attach(base, run.model, run.tuning, trainable=True, master_dtype=precision.master)
    if streamed is None:
        return module, no_weights
    return module, partial(streamed[1].fill, module, mesh.device, on_host=mesh.layout.offload == "params")


def random_model(run: Run, mesh: Mesh) -> Model:
    """A model of which only the config is there, random weights made on the device."""
    precision = resolve(run)
    torch.manual_seed(run.training.seed + mesh.rank)
    return blank_model(run, precision.load, precision.master, mesh.device, on_meta=mesh.layout.splits_model)


def assemble(
    run: Run, mesh: Mesh, model: Model, max_tokens: int, recompute: Recompute = "none", keeps: Keeps = NOTHING
) -> Ready:
    """Split a model and put its step and its optimizer together.

    Args:
        max_tokens: positions of a micro-batch on a data-parallel rank.
        keeps: whether 4-bit weights are unpacked, and of how many layers nothing is computed again.
    """
    built = build(run, resolve(run), mesh, *model, wishes=Fast(compiled=bool(run.training.torch_compile)))
    if keeps.unpacked:
        built.keep_unpacked(run)
    built.recompute(recompute, keeps.spared)
    built.module.train()
    groups = parameter_groups(built.module, run.training, run.tuning)
    optimizer = registry.load("fourfold.training.optimizers", run.training.optim, key="optim")
    objective: Objective = registry.load("fourfold.objectives", run.training.stage, key="stage").build(run)
    policy = CutPolicy(
        packed=built.model.packed,
        max_tokens=max_tokens,
        multiple=built.multiple,
        min_batches=built.split.min_batches,
    )
    return Ready(
        built,
        built.step(objective, partial(filler, policy)),
        policy,
        optimizer.build(groups, built.module, run),
        [parameter for parameter in built.module.parameters() if parameter.requires_grad],
        run.training.max_grad_norm,
    )


def made_up(source: random.Random, length: int, vocabulary: int, index: int, skipped: int = 0) -> Sample:
    """A sample of random tokens, of which the first `skipped` are not trained."""
    ids = [source.randrange(3, vocabulary) for _ in range(length)]
    return Sample({"": Example(ids, [IGNORE_INDEX] * skipped + ids[skipped:])}, index)


def free(device: torch.device) -> None:
    """Give back what a case has left, which modules keep in cycles, and begin to count the peak anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib(device: torch.device) -> tuple[float, float]:
    """The most that the allocator had handed out, and reserved, on this rank; zeros without a GPU."""
    if device.type != "cuda":
        return 0.0, 0.0
    return torch.cuda.max_memory_allocated() / 2**30, torch.cuda.max_memory_reserved() / 2**30
