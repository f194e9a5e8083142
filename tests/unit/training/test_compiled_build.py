"""A model as it is built to run compiled gives the losses and gradients of one that runs as it is."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch

from fourfold.config.load import load
from fourfold.dataset.batch import Example, Sample
from fourfold.dataset.collate import CutPolicy, cut, filler
from fourfold.losses.token import TokenLoss
from fourfold.models.adapters import attach
from fourfold.models.compiled import compile_layers
from fourfold.models.load import load_model
from fourfold.models.lora import join_siblings
from fourfold.parallel.mesh import single
from fourfold.training import build as building
from fourfold.training.fast import NOTHING_FAST, Fast
from fourfold.training.precision import resolve
from tiny_models import tiny_model

pytestmark = pytest.mark.filterwarnings("default")  # as an error, what torch's compiler warns of would end it

_POLICY = CutPolicy(packed=False, max_tokens=64)


def _samples(step: int) -> list[Sample]:
    generator = torch.Generator().manual_seed(step)
    lengths = (30, 17, 24, 9)
    rows = [torch.randint(3, 300, (length,), generator=generator).tolist() for length in lengths]
    return [Sample({"": Example(ids, ids)}, 4 * step + index) for index, ids in enumerate(rows)]


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CPU is not given is given to it."""
    monkeypatch.setattr(building, "what_goes", lambda wishes, *_: wishes)
    monkeypatch.setattr(
        building, "_join_layers", lambda run, mesh, module: join_siblings(module, apart=building._apart(run, module))
    )
    monkeypatch.setattr(building, "compile_layers", partial(compile_layers, backend="aot_eager"))
    monkeypatch.setattr(building, "has_kernel", lambda device: False)


def _train(folder: Path, wishes: Fast, keys: dict[str, Any], *, copies: bool) -> tuple[list[float], torch.Tensor]:
    """Losses of three steps of two micro-batches and more, and the weights of an MLP after them."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    run = load(
        {"model_name_or_path": str(folder), "dataset": "d", "output_dir": "o", "bf16": True, **keys}, verb="train"
    )
    precision = resolve(run)
    model = load_model(run.model, dtype=precision.load, device=torch.device("cpu"))
    module = attach(model, run.model, run.tuning, trainable=True, master_dtype=precision.master)
    built = building.build(run, precision, single(torch.device("cpu")), module, packs=False, wishes=wishes)
    built.model.fixed = False  # the kernel that is given offsets alone is a GPU's
    if copies:
        assert built.keep_copies() > 0
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    step = built.step(TokenLoss(), partial(filler, _POLICY))
    module.train()
    losses: list[float] = []
    for number in range(3):
        batches = cut(_samples(number), _POLICY)
        assert len(batches) > 1
        losses.append(step.forward_backward(batches).loss)
        optimizer.step()
        optimizer.zero_grad()
    return losses, torch.cat([parameter.detach().flatten() for parameter in trained])


_KEYS: dict[str, tuple[dict[str, Any], bool]] = {
    "full": ({"finetuning_type": "full"}, False),
    "full-copies": ({"finetuning_type": "full"}, True),
    "lora": ({"finetuning_type": "lora", "lora_rank": 4}, False),
}
_IN_EVERY_RUN = {("llama", "full-copies"), ("llama", "lora"), ("olmo", "full")}


@pytest.mark.usefixtures("as_on_a_gpu")
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
