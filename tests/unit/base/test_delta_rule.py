"""The gated delta rule: that it is Transformers', and what the rule says position by position, and keeps its inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from delta_rules import Rule, transformers_rule
from fourfold.base import delta_rule
from fourfold.base.delta_rule import chunk_gated_delta_rule


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
def test_rule_when_rows_are_of_any_length_is_transformers_and_the_recurrence(positions: int, key_heads: int) -> None:
    inputs, state = _inputs(positions, key_heads=key_heads), _state()
    found = _all_of(chunk_gated_delta_rule, inputs, state)
    expected = _all_of(transformers_rule(), inputs, state)
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
    decay: float, beta: float, alike: float
) -> None:
    inputs = _inputs(150, decay=decay, beta=beta, alike=alike)
    expected = _all_of(_step_by_step, inputs)
    of_transformers = _error(_all_of(transformers_rule(), inputs), expected)
    assert of_transformers < 2e-3
    assert _error(_all_of(chunk_gated_delta_rule, inputs), expected) < max(2 * of_transformers, 5e-6)


def test_rule_when_inputs_are_bf16_computes_in_fp32_and_rounds_results() -> None:
    inputs = _inputs(100, dtype=torch.bfloat16)
    found, expected = _all_of(chunk_gated_delta_rule, inputs), _all_of(transformers_rule(), inputs)
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
