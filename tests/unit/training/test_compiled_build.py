"""A model as it is built to run compiled gives the losses and gradients of one that runs as it is."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
import torch._dynamo

from compiled_building import build_as_on_a_gpu, train_built
from fourfold.parallel.mesh import single
from fourfold.training.fast import NOTHING_FAST, Fast
from tiny_models import tiny_model

pytestmark = pytest.mark.filterwarnings("default")  # as an error, what torch's compiler warns of would end it

_KEYS: dict[str, tuple[dict[str, Any], bool]] = {
    "full": ({"finetuning_type": "full"}, False),
    "full-copies": ({"finetuning_type": "full"}, True),
    "lora": ({"finetuning_type": "lora", "lora_rank": 4}, False),
}
_IN_EVERY_RUN = {("llama", "full-copies"), ("llama", "lora"), ("olmo", "full")}


def _train(folder: Path, wishes: Fast, keys: dict[str, Any], *, copies: bool) -> tuple[list[float], torch.Tensor]:
    torch._dynamo.reset()
    built = build_as_on_a_gpu(folder, wishes, single(torch.device("cpu")), **keys)
    if copies:
        assert built.keep_copies() > 0
    losses, weights = train_built(built)
    return losses, torch.cat([weight.flatten() for weight in weights.values()])


@pytest.mark.parametrize(
    ("family", "case"),
    [
        pytest.param(family, case, marks=() if (family, case) in _IN_EVERY_RUN else pytest.mark.grid)
        for family in ("llama", "qwen3", "gemma3_text", "mistral", "olmo")
        for case in _KEYS
    ],
)
def test_training_when_built_to_run_compiled_is_that_of_layers_as_they_are(
    family: str, case: str, tmp_path: Path
) -> None:
    keys, copies = _KEYS[case]
    tiny_model(family).save_pretrained(tmp_path)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    plain, weights = _train(tmp_path, NOTHING_FAST, keys, copies=False)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
    losses, found = _train(tmp_path, Fast(compiled=True), keys, copies=copies)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before
    assert mean(abs(a - b) for a, b in zip(losses, plain, strict=True)) <= 2e-3
    assert float((found - weights).abs().mean()) <= 1e-4


@pytest.mark.parametrize(
    ("family", "case", "recompute"),
    [
        ("lfm2", "lora", False),
        ("qwen3_5_text", "lora", True),
        pytest.param("qwen3_5_text", "full", False, marks=pytest.mark.grid),
        pytest.param("granitemoehybrid", "lora", True, marks=pytest.mark.grid),
        pytest.param("falcon_h1", "lora", False, marks=pytest.mark.grid),
        pytest.param("lfm2_moe", "full", True, marks=pytest.mark.grid),
    ],
)
def test_training_when_layers_carry_a_state_is_compiled_around_it_over_packed_rows(
    family: str, case: str, recompute: bool, tmp_path: Path
) -> None:
    keys, _ = _KEYS[case]
    tiny_model(family).save_pretrained(tmp_path)
    found: list[list[float]] = []
    for wishes in (NOTHING_FAST, Fast(compiled=True)):
        torch._dynamo.reset()
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        built = build_as_on_a_gpu(tmp_path, wishes, single(torch.device("cpu")), packs=True, **keys, bf16=False)
        assert built.model.packed
        if recompute:
            built.recompute("full")
        found.append(train_built(built)[0])
        compiled = built.model.compiled
        assert (compiled is not None) == wishes.compiled
        assert compiled is None or not (compiled.trains_plain or compiled.asks_plain)
        assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] > before) == wishes.compiled
    assert found[1] == pytest.approx(found[0], rel=1e-5)
