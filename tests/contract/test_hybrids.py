"""Models whose layers carry a state along a row train on packed rows as on padded ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fourfold.models.document_rows import alike
from fourfold.models.targets import lora_targets
from tiny_models import HYBRIDS, save_tiny_model, tiny_model
from training_runs import losses, run, write_dataset

_FAMILIES = ("lfm2", "qwen3_5_text", "granitemoehybrid")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and a model of each family."""
    folder = tmp_path_factory.mktemp("hybrids")
    write_dataset(folder / "data")
    for family in _FAMILIES:
        save_tiny_model(folder / family, family)
    return folder


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"finetuning_type": "full"},
        {"lora_dropout": 0.1, "neftune_noise_alpha": 5.0},
        {"parallel": {"recompute": "full"}},
        {"parallel": {"recompute": "selective"}},
        {"packing": True, "cutoff_len": 128},
        {"stage": "dpo", "dataset": "tiny_pairs"},
        {"stage": "kto", "dataset": "tiny_tags"},
        {"eval_dataset": "tiny", "eval_strategy": "steps", "eval_steps": 2},
    ],
    ids=["lora", "full", "noise", "recompute", "selective", "packing", "dpo", "kto", "evaluation"],
)
@pytest.mark.parametrize("family", _FAMILIES)
def test_losses_when_packed_are_those_of_padded_rows(
    family: str, options: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    for name, attention in (("packed", "auto"), ("padded", "sdpa")):
        run(
            folder / family,
            folder / "data",
            tmp_path / name,
            flash_attn=attention,
            max_steps=4,
            learning_rate=1e-3,
            **options,
        )
    for key in ("loss", "grad_norm", *(["eval_loss"] if "eval_steps" in options else [])):
        found, expected = losses(tmp_path / "packed", key), losses(tmp_path / "padded", key)
        assert len(expected) >= 2
        assert found == pytest.approx(expected, rel=1e-4)


def test_documents_in_batches_are_at_least_half_as_long_as_the_longest() -> None:
    lengths = (100, 3000, 40, 1600, 1400, 90, 220, 3000)
    batches = alike(lengths)
    assert sorted(number for batch in batches for number in batch) == list(range(len(lengths)))
    assert [[lengths[number] for number in batch] for batch in batches] == [
        [3000, 3000, 1600],
        [1400],
        [220],
        [100, 90, 40],
    ]


@pytest.mark.parametrize("family", sorted(HYBRIDS))
def test_adapters_when_all_are_wanted_are_of_linear_layers_and_experts(family: str) -> None:
    """A convolution's weight has three dimensions as well; its layer reads it past any adapter."""
    targets = lora_targets(tiny_model(family), ("all",))
    assert not any("conv" in name for name in (*targets.modules, *targets.parameters))
    assert bool(targets.parameters) == (family in ("lfm2_moe", "qwen3_5_moe_text", "qwen3_next"))
