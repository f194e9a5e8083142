"""A second model beside the one that is trained, split over the same ranks and never changed."""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from fourfold.base.log import told_elsewhere
from fourfold.config.schema import Run
from fourfold.models.adapters import attach
from fourfold.models.load import load_model
from fourfold.parallel.mesh import Mesh
from fourfold.training.build import Built, build
from fourfold.training.precision import resolve


def frozen_run(run: Run, model: str, adapters: str | None, bits: int | None) -> Run:
    """The run as if another model were the one that it loads."""
    names = tuple(name.strip() for name in (adapters or "").split(",") if name.strip())
    keys = {"model_name_or_path": model, "adapter_name_or_path": names, "quantization_bit": bits, "resize_vocab": False}
    tuning = run.tuning.model_copy(update={"finetuning_type": "lora" if names else "full"})
    return replace(run, model=run.model.model_copy(update=keys), tuning=tuning)


def build_frozen(run: Run, mesh: Mesh, tokenizer: PreTrainedTokenizerBase) -> Built:
    """The model of `frozen_run`, in evaluation mode and without gradients, split as the mesh says.

    Raises:
        ModelError: it cannot be loaded; the message names it.
        ConfigError: settings that do not fit it.
    """
    precision = resolve(run)
    with told_elsewhere(mesh.rank != 0):
        model = load_model(
            run.model, dtype=precision.compute, device=mesh.device, tokenizer=tokenizer, seq_len=run.data.cutoff_len
        )
        module = attach(model, run.model, run.tuning, trainable=False)
    built = build(run, precision, mesh, module)
    built.module.requires_grad_(False)
    built.module.eval()
    return built
