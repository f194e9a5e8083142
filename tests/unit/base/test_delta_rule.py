"""The gated delta rule: that it is Transformers', and what the rule says position by position, and keeps its inputs."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.models.qwen3_5 import modeling_qwen3_5

from fourfold.base import delta_rule
from fourfold.base.delta_rule import chunk_gated_delta_rule, install, is_wanted
from fourfold.models.patches import recompute_noise_ignored
from tiny_models import VOCAB_SIZE, tiny_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
NAME = "torch_chunk_gated_delta_rule"
Rule = Callable[..., tuple[Tensor, Tensor | None]]


@pytest.fixture(scope="session")
def transformers_rule() -> Rule:
    """Of a copy of the module, since that of the process may have had it exchanged. Takes as many key heads as value
    heads: Transformers 5.17 has its layers repeat them, 5.24 the rule itself."""
    spec = importlib.util.find_spec(modeling_qwen3_5.__name__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    own = getattr(module, NAME)

    def rule(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        query, key = (x.repeat_interleave(value.shape[2] // key.shape[2], 2) for x in (query, key))
        return own(query, key, value, *args, **kwargs)

    return rule


def _step_by_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """The rule as it is written down, one position after the other, in fp64."""
    query, key, value, g, beta = (x.double() for x in (query, key, value, g, beta))
    if use_qk_l2norm_in_kernel:
        query, key = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (query, key))
    query, key = (x.repeat_interleave(value.shape[2] // key.shape[2], 2) for x in (query, key))
    state = torch.zeros(len(value), value.shape[2], key.shape[3], value.shape[3], dtype=torch.float64)
    state = state if initial_state is None else initial_state.double()
    out = []
    for t in range(value.shape[1]):
        state = state * g[:, t].exp()[..., None, None]
        told = torch.einsum("bhkv,bhk->bhv", state, key[:, t])
        state = state + torch.einsum("bh,bhk,bhv->bhkv", beta[:, t], key[:, t], value[:, t] - told)
        out.append(torch.einsum("bhkv,bhk->bhv", state, query[:, t]) / query.shape[-1] ** 0.5)
    return torch.stack(out, 1), state


def _inputs(
    positions: int,
    *,
    key_heads: int = 2,
    decay: float = 0.1,
    beta: float = 0.5,
    alike: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> list[Any]:
    """query, key [2 S Hk 16], value [2 S 4 24], g and beta [2 S 4], of which the last two are near the given values.

    Args:
        alike: how much of each key is the same for all.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    query, key = random(2, positions, key_heads, 16), random(2, positions, key_heads, 16)
    key = alike * random(1, 1, key_heads, 16) + (1 - alike) * key
    made = [query, key, random(2, positions, 4, 24)]
    strength = uniform(2, positions, 4) * decay
    made = [*(x.to(dtype) for x in made), -2 * strength, (beta * (1 - 0.02 * uniform(2, positions, 4))).to(dtype)]
    return [x.requires_grad_() for x in made]


def _state() -> Tensor:
    """An initial state [2 4 16 24]."""
    return torch.randn(2, 4, 16, 24, generator=torch.Generator().manual_seed(1)).requires_grad_()


def _all_of(rule: Rule, inputs: list[Tensor], state: Tensor | None = None, normalizes: bool = True) -> list[Tensor]:
    """Output, final state, and the gradients of all inputs and of the state, for weights that differ everywhere."""
    out, final = rule(*inputs, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=normalizes)
    assert final is not None
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(x.shape, generator=generator) for x in (out, final)]
    total = (out * weights[0]).sum() + (final * weights[1]).sum()
    return [out, final, *torch.autograd.grad(total, inputs if state is None else [*inputs, state])]


def _error(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, over the largest value of what it is in."""
    assert [x.shape for x in found] == [x.shape for x in expected]
    pairs = zip(found, expected, strict=True)
    return max(((a.double() - b.double()).abs().max() / b.double().abs().max()).item() for a, b in pairs)


@pytest.mark.parametrize("key_heads", [2, 4])
@pytest.mark.parametrize("positions", [1, 63, 64, 65, 200])
def test_rule_when_rows_are_of_any_length_is_transformers_and_the_recurrence(
    positions: int, key_heads: int, transformers_rule: Rule
) -> None:
    inputs, state = _inputs(positions, key_heads=key_heads), _state()
    found = _all_of(chunk_gated_delta_rule, inputs, state)
    expected = _all_of(transformers_rule, inputs, state)
    assert [x.dtype for x in found] == [x.dtype for x in expected]
    assert _error(found, expected) < 5e-6
    assert _error(found, _all_of(_step_by_step, inputs, state)) < 5e-6


@pytest.mark.parametrize("normalizes", [False, True])
def test_rule_when_keys_are_left_as_they_are_or_not_is_the_recurrence(normalizes: bool) -> None:
    query, key, *others = _inputs(100, beta=0.05)
    inputs = [query, key, *others]
    expected = _all_of(_step_by_step, inputs, normalizes=normalizes)
    assert _error(_all_of(chunk_gated_delta_rule, inputs, normalizes=normalizes), expected) < 5e-6


@pytest.mark.parametrize(
    ("decay", "beta", "alike"),
    [(1e-3, 1.0, 0.0), (1e-3, 2.0, 0.0), (1e-3, 1.0, 0.9), (1e-3, 2.0, 0.9), (3.0, 1.0, 0.0), (40.0, 2.0, 0.9)],
)
def test_rule_when_values_are_extreme_is_no_less_exact_than_transformers(
    decay: float, beta: float, alike: float, transformers_rule: Rule
) -> None:
    inputs = _inputs(150, decay=decay, beta=beta, alike=alike)
    expected = _all_of(_step_by_step, inputs)
    of_transformers = _error(_all_of(transformers_rule, inputs), expected)
    assert of_transformers < 2e-3
    assert _error(_all_of(chunk_gated_delta_rule, inputs), expected) < max(2 * of_transformers, 5e-6)


def test_rule_when_inputs_are_bf16_computes_in_fp32_and_rounds_results(transformers_rule: Rule) -> None:
    inputs = _inputs(100, dtype=torch.bfloat16)
    found, expected = _all_of(chunk_gated_delta_rule, inputs), _all_of(transformers_rule, inputs)
    assert [x.dtype for x in found] == [x.dtype for x in expected]
    assert found[0].dtype == torch.bfloat16
    assert found[1].dtype == torch.float32
    assert _error(found[1:2], expected[1:2]) < 5e-6
    assert _error(found, expected) < 2**-7
    wide = [x.detach().float().requires_grad_() for x in inputs]
    assert _error(found, _all_of(_step_by_step, wide)) < 2**-7


def test_rule_when_autocast_is_on_computes_in_fp32() -> None:
    inputs = _inputs(100)
    expected = _all_of(chunk_gated_delta_rule, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = _all_of(chunk_gated_delta_rule, inputs)
    assert _error(found, expected) == 0


@pytest.mark.parametrize("given", [False, True])
def test_rule_when_rows_go_through_in_segments_gives_the_same(given: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, state = _inputs(300), _state() if given else None
    expected = _all_of(chunk_gated_delta_rule, inputs, state)
    monkeypatch.setattr(delta_rule, "_SEGMENT", 2 * 4 * 130)  # two chunks of all heads, and a little
    assert _error(_all_of(chunk_gated_delta_rule, inputs, state), expected) < 2e-6


def test_rule_when_a_row_is_continued_from_its_state_gives_what_the_whole_gives() -> None:
    inputs = [x.detach() for x in _inputs(150)]
    whole, last = chunk_gated_delta_rule(*inputs, output_final_state=True)
    first, state = chunk_gated_delta_rule(*(x[:, :70] for x in inputs), output_final_state=True)
    second, behind = chunk_gated_delta_rule(*(x[:, 70:] for x in inputs), initial_state=state, output_final_state=True)
    assert last is not None
    assert behind is not None
    assert _error([torch.cat((first, second), 1), behind], [whole, last]) < 5e-6


def test_rule_when_the_state_is_not_asked_for_returns_none() -> None:
    with torch.no_grad():
        out, state = chunk_gated_delta_rule(*_inputs(5))
    assert state is None
    assert not out.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rule_when_trained_keeps_its_inputs_alone(dtype: torch.dtype) -> None:
    inputs, kept = _inputs(200, dtype=dtype), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        chunk_gated_delta_rule(*inputs, use_qk_l2norm_in_kernel=True)
    *whole, between = kept
    assert {x.data_ptr() for x in whole} == {x.data_ptr() for x in inputs}
    assert [x.dtype for x in whole] == [x.dtype for x in inputs]
    assert between.numel() == 0


def test_rule_when_rows_are_long_keeps_a_state_for_each_further_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delta_rule, "_SEGMENT", 2 * 4 * 64)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        chunk_gated_delta_rule(*_inputs(200))
    assert [x.shape for x in kept[5:]] == [(3, 2, 4, 16, 24)]


@pytest.mark.parametrize("number", range(6))
def test_rule_when_one_input_has_a_gradient_gives_that_one(number: int) -> None:
    inputs = [*_inputs(70), _state()]
    expected = _all_of(chunk_gated_delta_rule, inputs[:5], inputs[5])[2 + number]
    for other, x in enumerate(inputs):
        x.requires_grad_(other == number)
    out, final = chunk_gated_delta_rule(
        *inputs[:5], initial_state=inputs[5], output_final_state=True, use_qk_l2norm_in_kernel=True
    )
    assert final is not None
    generator = torch.Generator().manual_seed(2)
    total = sum((x * torch.randn(x.shape, generator=generator)).sum() for x in (out, final))
    assert isinstance(total, Tensor)
    total.backward()
    assert [x.grad is not None for x in inputs] == [other == number for other in range(6)]
    assert torch.equal(inputs[number].grad, expected)


@pytest.mark.parametrize("which", [0, 1])
def test_rule_when_only_one_of_its_results_is_used_gives_the_gradients_of_that(which: int) -> None:
    inputs = _inputs(70)
    grads = []
    for rule in (chunk_gated_delta_rule, _step_by_step):
        result = rule(*inputs, output_final_state=True)[which]
        assert result is not None
        grads.append(torch.autograd.grad(result.square().sum(), inputs, allow_unused=True))
    # what is read of a state does not reach the state
    found, expected = ([torch.zeros(()) if x is None else x for x in some][which:] for some in grads)
    assert which == 0 or not grads[0][0].any()
    assert _error(list(found), list(expected)) < 5e-6


@pytest.mark.parametrize("reentrant", [False, True])
def test_rule_when_computed_again_in_the_backward_pass_gives_the_same(reentrant: bool) -> None:
    inputs = _inputs(100)
    expected = torch.autograd.grad(chunk_gated_delta_rule(*inputs)[0].square().sum(), inputs)

    def layer(*inputs: Any) -> Tensor:
        return chunk_gated_delta_rule(*inputs)[0].square()

    made = checkpoint(layer, *inputs, use_reentrant=reentrant)
    assert isinstance(made, Tensor)
    made.sum().backward()
    for x, grad in zip(inputs, expected, strict=True):
        assert torch.equal(x.grad, grad)


def test_rule_when_derived_twice_raises() -> None:
    inputs = _inputs(5)
    (grad, *_) = torch.autograd.grad(chunk_gated_delta_rule(*inputs)[0].square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("name", ["cu_seqlens", "seq_idx"])
def test_rule_when_rows_hold_documents_raises(name: str) -> None:
    inputs = _inputs(5)
    chunk_gated_delta_rule(*inputs, **{name: None}, other=1)
    with pytest.raises(ValueError, match=f"{name}: a row"):
        chunk_gated_delta_rule(*inputs, **{name: torch.tensor([0, 2, 5])})


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch, transformers_rule: Rule) -> PreTrainedModel:
    """Tiny, with Transformers' own rule, and the process as it was afterwards.

    Its weights are small: the larger ones of other tests make differences of rounding a hundred times as large.
    """
    monkeypatch.setattr(modeling_qwen3_5, NAME, transformers_rule)
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
            delta_rule, "importlib", SimpleNamespace(import_module=importlib.import_module, util=found)
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


def test_install_when_fla_trains_leaves_the_model_as_it_is(
    stack: _Stack, model: PreTrainedModel, transformers_rule: Rule
) -> None:
    stack.set(triton="3.7.1")
    assert not install(model, CUDA)
    assert getattr(modeling_qwen3_5, NAME) is transformers_rule
