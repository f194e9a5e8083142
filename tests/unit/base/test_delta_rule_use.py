"""Which models compute the gated delta rule as Fourfold does, and that nothing else changes by it."""

from __future__ import annotations

import importlib
import logging
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.qwen3_5 import modeling_qwen3_5

from delta_rules import NAME, transformers_rule
from fourfold.base import delta_rule_use
from fourfold.base.delta_rule import chunk_gated_delta_rule
from fourfold.base.delta_rule_use import install, is_wanted
from fourfold.models.patches import recompute_noise_ignored
from tiny_models import VOCAB_SIZE, tiny_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> PreTrainedModel:
    """Tiny, with Transformers' own rule, and the process as it was afterwards.

    Its weights are small: the larger ones of other tests make differences of rounding a hundred times as large.
    """
    monkeypatch.setattr(modeling_qwen3_5, NAME, transformers_rule())
    return tiny_model("qwen3_5_text", initializer_range=0.05)


def _trained(model: PreTrainedModel) -> list[Tensor]:
    """Logits and the gradients of a loss on fixed tokens."""
    tokens = torch.arange(140).view(2, 70) * 7 % VOCAB_SIZE
    made = model(input_ids=tokens, labels=tokens, use_cache=False)
    model.zero_grad()
    made.loss.backward()
    return [made.logits.detach(), *(x.grad.clone() for x in model.parameters() if x.grad is not None)]


@pytest.mark.parametrize("recomputes", [False, True])
def test_install_when_a_model_trains_changes_neither_logits_nor_gradients(
    recomputes: bool, model: PreTrainedModel
) -> None:
    expected = _trained(model)
    assert install(model, CPU)
    assert getattr(modeling_qwen3_5, NAME) is chunk_gated_delta_rule
    if recomputes:
        with recompute_noise_ignored():
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    found = _trained(model)
    assert len(found) > 40
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)  # the largest gradient is 0.1


def test_install_when_a_model_generates_gives_the_same_tokens(model: PreTrainedModel) -> None:
    tokens: Any = torch.arange(66)[None]
    asked: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "pad_token_id": 2}
    asked["return_dict_in_generate"] = True
    generate: Any = model.generate
    expected = generate(tokens, **asked)
    install(model, CPU)
    found = generate(tokens, **asked)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=1e-5, rtol=1e-5)


def test_install_when_called_again_changes_nothing(model: PreTrainedModel, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert install(model, CPU)
        assert install(model, CPU)
    assert getattr(modeling_qwen3_5, NAME) is chunk_gated_delta_rule
    assert caplog.messages == []


def test_install_when_a_model_has_no_such_layers_does_nothing() -> None:
    assert not install(tiny_model("llama"), CPU)


class _Stack:
    """Stands in for what is installed, and for the GPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self._add("fla", {})
        self._add("fla.ops", {})
        self._add("fla.ops.gated_delta_rule", {"chunk_gated_delta_rule": None})
        self.set()

    def set(
        self, *, triton: str = "3.6.0", capability: int = 9, tilelang: bool = False, nvcc: bool | None = True
    ) -> None:
        self._add("triton", {"__version__": triton})
        self._add("fla.utils", {} if nvcc is None else {"has_usable_nvcc": lambda: nvcc})
        self._monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (capability, 0))
        found = SimpleNamespace(find_spec=lambda name: object() if tilelang and name == "tilelang" else None)
        self._monkeypatch.setattr(
            delta_rule_use, "importlib", SimpleNamespace(import_module=importlib.import_module, util=found)
        )

    def _add(self, name: str, entries: dict[str, object]) -> None:
        module = ModuleType(name)
        module.__dict__.update(entries)
        self._monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch) -> _Stack:
    monkeypatch.delenv("FLA_TILELANG", raising=False)
    return _Stack(monkeypatch)


@pytest.mark.parametrize(
    ("there", "wanted"),
    [
        ({}, True),
        ({"triton": "3.7.0"}, True),
        ({"triton": "3.4.0+git1234"}, True),
        ({"triton": "3.7.1"}, False),
        ({"triton": "3.3.1"}, False),
        ({"capability": 8}, False),
        ({"capability": 10}, False),
        ({"tilelang": True}, False),
        ({"tilelang": True, "nvcc": None}, False),
        ({"tilelang": True, "nvcc": False}, True),
    ],
)
def test_is_wanted_when_fla_is_there_says_whether_it_does_not_train(
    there: dict[str, Any], wanted: bool, stack: _Stack
) -> None:
    stack.set(**there)
    assert is_wanted(CUDA) == wanted


def test_is_wanted_when_tilelang_is_turned_off_is_true(stack: _Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    stack.set(tilelang=True)
    monkeypatch.setenv("FLA_TILELANG", "0")
    assert is_wanted(CUDA)


def test_is_wanted_when_the_model_is_on_the_cpu_is_true(stack: _Stack) -> None:
    stack.set(triton="3.7.1")
    assert is_wanted(CPU)


def test_is_wanted_when_fla_cannot_be_imported_is_true(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fla", None)
    assert is_wanted(CUDA)


def test_install_when_fla_is_there_and_does_not_train_says_so_once(
    stack: _Stack, model: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert install(model, CUDA)
        assert install(model, CUDA)
    (line,) = caplog.messages
    assert "Triton 3.6.0" in line
    assert "tilelang" in line


def test_install_when_fla_trains_leaves_the_model_as_it_is(stack: _Stack, model: PreTrainedModel) -> None:
    stack.set(triton="3.7.1")
    assert not install(model, CUDA)
    assert getattr(modeling_qwen3_5, NAME) is transformers_rule()
