"""A second model beside the one that is trained, split over the same ranks and never changed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fourfold.base.errors import ConfigError, ModelError, PlanError
from fourfold.base.log import told_elsewhere
from fourfold.config.schema import Run
from fourfold.models.adapters import attach
from fourfold.models.load import load_model, load_streamed
from fourfold.models.stream import Stream
from fourfold.models.unwrap import TunedModel, base_model
from fourfold.parallel.apply import no_weights
from fourfold.parallel.mesh import Mesh
from fourfold.parallel.shares import Shares
from fourfold.parallel.stacked_experts import has_experts
from fourfold.planning.layout import Layout
from fourfold.training.build import Built, build
from fourfold.training.precision import Precision, resolve


@contextmanager
def named_as(keys: Mapping[str, str]) -> Iterator[None]:
    """Within it, errors of loading and splitting name the keys of a second model.

    Args:
        keys: by key of the first model; that of its name comes first.
    """
    try:
        yield
    except (ConfigError, ModelError, PlanError) as error:
        text = str(error)
        for key, own in keys.items():
            text = re.sub(rf"\b{key}\b", own, text)
        if not any(own in text for own in keys.values()):
            text = f"{next(iter(keys.values()))}: {text}"
        raise type(error)(text) from error


def build_frozen(run: Run, mesh: Mesh, tokenizer: PreTrainedTokenizerBase, *, beside: Built | None = None) -> Built:
    """The model of `config.second.frozen_run`, in evaluation mode and without gradients, split as the mesh says.

    Its weights are in the dtype of the computation, or packed; layers in stages are dealt out evenly.

    Args:
        beside: the model whose batches it is fed, and whose vocabulary it shares; None for another time.
    Raises:
        ModelError: it cannot be loaded; the message names it.
        ConfigError: settings that do not fit it.
        PlanError: it cannot be split so.
    """
    dtype = resolve(run).compute
    with told_elsewhere(mesh.rank != 0):
        model, stream = _load(run, dtype, mesh, tokenizer)
        module = attach(model, run.model, run.tuning, trainable=False)
    fill = no_weights
    if stream is not None:
        fill = partial(stream.fill, module, mesh.device, on_host=mesh.layout.offload == "params")
    return split_frozen(run, mesh, module, fill, beside=beside)


def split_frozen(
    run: Run, mesh: Mesh, module: TunedModel, fill: Callable[[Shares], None], *, beside: Built | None = None
) -> Built:
    """Split a model of which nothing is trained, in place; arguments as those of `build` and `build_frozen`."""
    compute = resolve(run).compute
    built = build(
        run,
        Precision(compute, compute, None, loss_scaling=False),
        replace(mesh, layout=layout_of_frozen(mesh.layout, has_experts=has_experts(module))),
        module,
        fill,
        packs=beside is None or beside.model.packed,
        vocabulary=None if beside is None else base_model(beside.module).config.get_text_config().vocab_size,
    )
    built.module.eval()
    return built


def layout_of_frozen(layout: Layout, *, has_experts: bool) -> Layout:
    """The same ranks, for a model with another number of layers, and perhaps without experts to share."""
    layout = replace(layout, pp_layers=())
    return layout if has_experts or layout.ep == 1 else replace(layout, ep=1, cp_shards=True)


def _load(
    run: Run, dtype: torch.dtype, mesh: Mesh, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreTrainedModel, Stream | None]:
    seq_len = run.data.cutoff_len
    if mesh.layout.splits_model:
        streamed = load_streamed(run.model, run.tuning, dtype=dtype, tokenizer=tokenizer, seq_len=seq_len)
        if streamed is not None:
            return streamed
    return load_model(run.model, dtype=dtype, device=mesh.device, tokenizer=tokenizer, seq_len=seq_len), None
