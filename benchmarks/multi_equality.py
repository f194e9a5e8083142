"""Losses under a layout against those of one GPU: five steps on the same samples from the same weights.

Tables and tolerances: multi_layouts.py.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fourfold.config.load import load
from fourfold.dataset.batch import Sample
from fourfold.parallel.mesh import Mesh
from fourfold.parallel.whole import everyone
from multi_assembly import assemble, free, made_up, peak_gib, saved_model
from multi_layouts import LAYOUTS, MODELS, TINY_WIDTHS, Variant, layers_of, parse
from word_tokenizer import word_tokenizer

STEPS, SAMPLES = 5, 8
_TUNINGS: dict[str, dict[str, Any]] = {
    "full": {"finetuning_type": "full", "learning_rate": 1e-3},
    "lora": {"finetuning_type": "lora", "lora_dropout": 0.0, "learning_rate": 3e-3},
    "qlora": {"finetuning_type": "lora", "lora_dropout": 0.0, "learning_rate": 3e-3, "quantization_bit": 4},
}
"""Adapters begin with no effect; at this rate they have one after the first step."""
_BY_GRADIENT: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.1}
"""For routers, instead: AdamW makes whole steps of the last digits of gradients near 0, and which of two experts that
score nearly the same gets a token may hang on them. By AdamW all 40 layouts of 4 ranks agreed for two steps to 8e-7;
then some gave a token to another one, and losses were 6e-5, 8e-5 or 1.4e-4 apart, the same numbers for many layouts."""


def entries_of(model: str, layers: int, *, is_tiny: bool) -> dict[str, Any]:
    """The config of a model."""
    entries = {**MODELS[model], **(TINY_WIDTHS if is_tiny else {}), "num_hidden_layers": layers}
    return {**entries, **({"moe_intermediate_size": 64} if is_tiny and "num_experts" in entries else {})}


def write_model(work: Path, model: str, layers: int, *, is_tiny: bool) -> Path:
    """A folder with the model's config and random weights, made once on the host."""
    folder = work / f"{model}-{layers}"
    if (folder / "complete").exists():
        return folder
    entries = entries_of(model, layers, is_tiny=is_tiny)
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(model, **entries), dtype=torch.float32)
    made.save_pretrained(folder)
    (folder / "complete").touch()
    return folder


def make_steps(vocabulary: int, longest: int) -> list[list[Sample]]:
    """The samples of each step, of uneven lengths; of each a third is not trained."""
    source, steps = random.Random(7), []
    for step in range(STEPS):
        lengths = [source.randint(longest // 6, longest) for _ in range(SAMPLES)]
        steps.append(
            [made_up(source, n, vocabulary, step * SAMPLES + i, skipped=n // 3) for i, n in enumerate(lengths)]
        )
    return steps


def curve(variant: Variant, folder: Path, mesh: Mesh, *, is_tiny: bool) -> dict[str, Any]:
    """Train under a mesh; every rank of it must call.

    Returns:
        losses and norms of the steps, and the peak of this rank's memory in GiB.
    """
    run = load(
        {
            "model_name_or_path": str(folder),
            **_TUNINGS[variant.tuning],
            **(_BY_GRADIENT if "num_experts" in MODELS[variant.model] else {}),
            "bf16": variant.precision == "bf16",
            "max_grad_norm": 1.0,
        }
    )
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    longest = 96 if is_tiny else 512
    model = saved_model(run, mesh, word_tokenizer(config["vocab_size"]))
    ready = assemble(run, mesh, model, max_tokens=2 * longest)
    losses, norms = [], []
    for samples in make_steps(config["vocab_size"], longest):
        result, norm = ready.train(ready.cut(samples[mesh.dp_rank :: mesh.layout.dp]))
        losses.append(result.loss)
        norms.append(norm)
    return {"losses": losses, "norms": norms, "peak_allocated_gib": peak_gib(mesh.device)[0]}


def compare(found: Sequence[dict[str, Any]], reference: dict[str, Any]) -> dict[str, Any]:
    """What all ranks found beside what one GPU did: rank 0's losses, and the differences of the rank with the largest.

    A NaN is the largest of all.
    """

    def apart(one: dict[str, Any], key: str) -> list[float]:
        return [abs(a - b) for a, b in zip(one[key], reference[key], strict=True)]

    losses = [apart(one, "losses") for one in found]
    norms = [[d / abs(b) for d, b in zip(apart(one, "norms"), reference["norms"], strict=True)] for one in found]
    return {
        "losses": found[0]["losses"],
        "norms": found[0]["norms"],
        "largest_difference": _largest([d for one in losses for d in one]),
        "mean_difference": _largest([mean(one) for one in losses]),
        "largest_norm_difference": _largest([d for one in norms for d in one]),
        "peak_allocated_gib": [one["peak_allocated_gib"] for one in found],
    }


def _largest(values: list[float]) -> float:
    return next((value for value in values if value != value), max(values))


def run_case(name: str, reference: dict[str, Any], work: Path, mesh: Mesh, *, is_tiny: bool) -> dict[str, Any]:
    """A case of the table; every rank must call, and all get what all found.

    Args:
        reference: the row of `reference_of(name)`.
    """
    variant, layout = parse(name)
    folder = write_model_once(work, variant.model, layers_of(LAYOUTS[layout]), mesh.rank, is_tiny=is_tiny)
    free(mesh.device)
    return compare(everyone(curve(variant, folder, mesh, is_tiny=is_tiny)), reference)


def run_reference(name: str, work: Path, mesh: Mesh, rank: int, *, is_tiny: bool) -> dict[str, Any]:
    """What one GPU does, found by each rank for itself.

    Args:
        name: of a case that is to be compared with it.
        mesh: of one rank.
    """
    variant, layout = parse(name)
    folder = write_model_once(work, variant.model, layers_of(LAYOUTS[layout]), rank, is_tiny=is_tiny)
    free(mesh.device)
    return everyone(curve(variant, folder, mesh, is_tiny=is_tiny))[0]


def write_model_once(work: Path, model: str, layers: int, rank: int, *, is_tiny: bool) -> Path:
    """The folder of a model, written by rank 0 while the others wait; every rank must call."""
    if rank == 0:
        write_model(work, model, layers, is_tiny=is_tiny)
    everyone(None)
    return work / f"{model}-{layers}"
