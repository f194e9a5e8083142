"""A device is asked nothing between a micro-batch's first kernel and its last: the host goes on giving it work.

What would make the host wait for a GPU are reads of a number and results whose size the data decides. A CPU does them
at once, so they are watched for here by name; tests/gpu has the device itself complain.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fourfold.config.load import load
from fourfold.dataset.batch import IGNORE_INDEX, Batch, Example, Sample
from fourfold.dataset.collate import CutPolicy, cut
from fourfold.losses.token import TokenLoss
from fourfold.models.adapters import attach
from fourfold.models.load import load_model
from fourfold.models.value_head import add_value_head
from fourfold.parallel.loss import Outputs, document_values
from fourfold.parallel.mesh import single
from fourfold.training.build import Built, build
from fourfold.training.fast import NOTHING_FAST
from fourfold.training.precision import resolve
from tiny_models import FAMILIES, save_tiny_model

_ASKS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "unique_consecutive")


class NothingAsked(TorchDispatchMode):
    """Fails where a device would have to be waited for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in _ASKS, f"the device is asked: {name}"
        return func(*args, **(kwargs or {}))


def built_for(folder: Path, *, stage: str = "sft", **keys: object) -> tuple[Built, nn.Module]:
    """A model as a run builds it, in training mode."""
    config = {"model_name_or_path": str(folder), "dataset": "d", "output_dir": "o", "stage": stage, **keys}
    run = load(config, verb="train")
    precision = resolve(run)
    model = load_model(run.model, dtype=precision.load, device=torch.device("cpu"))
    module = attach(model, run.model, run.tuning, trainable=True, master_dtype=precision.master)
    if stage == "rm":
        add_value_head(module, run.model, seed=0, trains_bias=True)
    return build(run, precision, single(torch.device("cpu")), module, wishes=NOTHING_FAST), module.train()


def micro_batch(*, packed: bool = True) -> Batch:
    """Documents of different lengths, as it is on the device."""
    samples = []
    for index, length in enumerate((9, 20, 5)):
        ids = [(7 * index + i) % 300 + 3 for i in range(length)]
        samples.append(Sample({"": Example(ids, [IGNORE_INDEX] * 2 + ids[2:])}, index))
    [batch] = cut(samples, CutPolicy(packed=packed, max_tokens=200))
    return batch.with_scored()


def token_loss(outputs: Outputs, batch: Batch) -> Tensor:
    (term,) = TokenLoss().loss(outputs, batch).terms.values()
    return term.total


def sum_of_values(outputs: Outputs, batch: Batch) -> Tensor:
    return document_values(outputs, batch).sum()


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_family_when_trained_on_documents_asks_nothing(family: str, tuning: str, tmp_path: Path) -> None:
    built, _ = built_for(save_tiny_model(tmp_path / family, family), finetuning_type=tuning)
    batch = micro_batch(packed=built.model.packed)
    with NothingAsked():
        token_loss(built.model(batch), batch).backward()


@pytest.mark.parametrize(
    ("keys", "loss"),
    [
        ({"lora_dropout": 0.1, "neftune_noise_alpha": 5.0}, token_loss),
        ({"parallel": {"recompute": "full"}}, token_loss),
        ({"stage": "rm"}, sum_of_values),
    ],
    ids=["noise", "recompute", "values"],
)
def test_llama_when_trained_otherwise_asks_nothing(
    keys: dict[str, Any], loss: Callable[[Outputs, Batch], Tensor], tmp_path: Path
) -> None:
    built, _ = built_for(save_tiny_model(tmp_path / "llama"), **keys)
    batch = micro_batch()
    with NothingAsked():
        loss(built.model(batch), batch).backward()


def test_watch_when_a_number_is_read_fails() -> None:
    """So that the tests above can."""
    with NothingAsked(), pytest.raises(AssertionError, match="asked"):
        torch.ones(2).sum().item()
