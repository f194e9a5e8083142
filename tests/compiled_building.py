"""A model as it is built to run compiled on a GPU, on CPUs: kernels of GPUs aside."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch._dynamo

from fourfold.config.load import load
from fourfold.dataset.batch import Example, Sample
from fourfold.dataset.collate import CutPolicy, cut, filler
from fourfold.losses.token import TokenLoss
from fourfold.models.adapters import attach
from fourfold.models.compiled import compile_layers
from fourfold.models.load import load_model
from fourfold.parallel.mesh import Mesh
from fourfold.training import build as building
from fourfold.training.build import Built, build
from fourfold.training.fast import Fast
from fourfold.training.precision import resolve


def build_as_on_a_gpu(folder: Path, wishes: Fast, mesh: Mesh, *, packs: bool = False, **keys: Any) -> Built:
    """The model of a folder, in bf16, built with just what is wished."""
    torch.manual_seed(0)
    given = {"model_name_or_path": str(folder), "dataset": "d", "output_dir": "o", "bf16": True, **keys}
    run = load(given, verb="train")
    precision = resolve(run)
    model = load_model(run.model, dtype=precision.load, device=mesh.device)
    module = attach(model, run.model, run.tuning, trainable=True, master_dtype=precision.master)
    instead = {
        "what_goes": lambda wishes, *_: wishes,
        "_has_weights": lambda mesh: mesh.layout.shards == 1,
        "compile_layers": partial(compile_layers, backend="aot_eager"),
    }
    with ExitStack() as stack:
        for name, found in instead.items():
            stack.enter_context(mock.patch.object(building, name, found))
        built = build(run, precision, mesh, module, packs=packs, wishes=wishes)
    built.model.fixed = False  # the kernel that is given offsets alone is a GPU's
    return built


def _samples(step: int) -> list[Sample]:
    generator = torch.Generator().manual_seed(step)
    lengths = (30, 17, 24, 9)
    rows = [torch.randint(3, 300, (length,), generator=generator).tolist() for length in lengths]
    return [Sample({"": Example(ids, ids)}, 4 * step + index) for index, ids in enumerate(rows)]


def train_built(built: Built) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of three steps of two micro-batches and more, and the trained weights of this rank after them."""
    packed = built.model.packed
    policy = CutPolicy(
        packed=packed, max_tokens=64, multiple=built.multiple, min_batches=max(built.split.min_batches, 2)
    )
    trained = {name: weight for name, weight in built.module.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3)
    step = built.step(TokenLoss(), partial(filler, policy))
    built.module.train()
    losses: list[float] = []
    for number in range(3):
        batches = cut(_samples(number), policy)
        assert len(batches) > 1
        losses.append(step.forward_backward(batches).loss)
        optimizer.step()
        optimizer.zero_grad()
    return losses, {name: weight.detach().clone() for name, weight in trained.items()}
