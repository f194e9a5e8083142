"""Products of wide masters: the same numbers as autocast's, without its copies."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fourfold.models.masters import (
    WideLinear,
    add_within_products,
    copy_of,
    keep_copies,
    use_wide_products,
)
from fourfold.models.trained_linear import join_trained_siblings

pytestmark = pytest.mark.filterwarnings("default")  # as an error, what torch's compiler warns of would end it

_IN, _OUT = 24, 40


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(_IN, _OUT, bias=True), nn.Linear(_OUT, _IN, bias=False)
        self.frozen = nn.Linear(_IN, _IN).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.frozen(self.second(torch.relu(self.first(x))))


def _input() -> Tensor:
    return torch.randn(2, 7, _IN, generator=torch.Generator().manual_seed(1)).requires_grad_()


def _run(block: nn.Module, forward: Any = None) -> list[Tensor]:
    x = _input()
    with torch.autocast("cpu", torch.bfloat16):
        out = (block if forward is None else forward)(x)
    out.float().square().sum().backward()
    assert x.grad is not None
    return [out.detach(), x.grad, *(p.grad for p in block.parameters() if p.grad is not None)]


@pytest.mark.parametrize("compiled", [False, True])
def test_wide_products_when_autocast_would_copy_give_its_numbers(compiled: bool) -> None:
    plain = _Block()
    wide = copy.deepcopy(plain)
    assert use_wide_products([wide], torch.bfloat16) == 2
    assert [type(layer) for layer in wide.children()] == [WideLinear, WideLinear, nn.Linear]
    run = torch.compile(wide, backend="aot_eager", fullgraph=True, dynamic=True) if compiled else None
    expected, found = _run(plain), _run(wide, run)
    assert len(found) == 5
    for one, other in zip(expected, found, strict=True):
        assert one.dtype == other.dtype
        assert float((one - other).abs().max()) <= 1e-2 * float(one.abs().max())


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("adds", [False, True])
def test_gradients_of_masters_when_there_are_several_micro_batches_are_their_sum(compiled: bool, adds: bool) -> None:
    wide, other = _Block(), _Block()
    assert use_wide_products([wide], torch.bfloat16) == use_wide_products([other], torch.bfloat16) == 2
    if adds:
        assert add_within_products([wide]) == 2
    run = torch.compile(wide, backend="aot_eager", fullgraph=True, dynamic=True) if compiled else wide
    expected = {name: torch.zeros_like(parameter) for name, parameter in other.named_parameters()}
    places: list[int] = []
    for number in range(3):
        other.zero_grad()
        for forward in (run, other):
            x = torch.randn(2, 5 + number, _IN, generator=torch.Generator().manual_seed(number)).requires_grad_()
            with torch.autocast("cpu", torch.bfloat16):
                out = forward(x)
            out.float().square().sum().backward()
        for name, parameter in other.named_parameters():
            if parameter.grad is not None:
                expected[name] += parameter.grad
        assert wide.first.weight.grad is not None
        places.append(wide.first.weight.grad.data_ptr())
    assert len(set(places)) == 1
    for name, parameter in wide.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-6, atol=1e-5)


def test_gradients_of_masters_when_a_layer_is_used_twice_are_counted_once_each() -> None:
    wide, other = _Block(), _Block()
    for block in (wide, other):
        use_wide_products([block], torch.bfloat16)
    add_within_products([wide])
    for block in (wide, other):
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                out = block(block(_input()))
            out.float().square().sum().backward()
    assert wide.first.weight.grad is not None
    torch.testing.assert_close(wide.first.weight.grad, other.first.weight.grad, rtol=1e-5, atol=1e-5)


def test_wide_products_when_weights_are_in_the_compute_dtype_are_left_out() -> None:
    assert use_wide_products([_Block().to(torch.bfloat16)], torch.bfloat16) == 0


def test_wide_products_when_differentiated_keep_no_copy_of_a_weight() -> None:
    def kept(block: nn.Module) -> set[tuple[torch.Size, torch.dtype]]:
        found: set[tuple[torch.Size, torch.dtype]] = set()

        def note(tensor: Tensor) -> Tensor:
            found.add((tensor.shape, tensor.dtype))
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16):
            block(_input())
        return {(shape, dtype) for shape, dtype in found if dtype == torch.bfloat16 and shape.numel() == _OUT * _IN}

    plain, wide = _Block(), _Block()
    use_wide_products([wide], torch.bfloat16)
    assert kept(plain)
    assert not kept(wide)


def test_operators_of_wide_products_when_checked_by_torch_pass() -> None:
    x, weight = torch.randn(6, _IN, dtype=torch.bfloat16), torch.randn(_OUT, _IN)
    grad = torch.randn(6, _OUT, dtype=torch.bfloat16)
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.fourfold.wide_product, (x, [weight]), test_utils=utils)
    for wants_x in (False, True):
        torch.library.opcheck(torch.ops.fourfold.wide_product_back, (grad, x, [weight], wants_x), test_utils=utils)


class _Attention(nn.Module):
    """Three layers of one input, and one of another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.k_proj = nn.Linear(_IN, 40, bias=True), nn.Linear(_IN, 16, bias=False)
        self.v_proj, self.o_proj = nn.Linear(_IN, 16, bias=True), nn.Linear(40, _IN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return x + self.o_proj(torch.cat([torch.tanh(q[..., :16] * k) + v, q[..., 16:]], -1))


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_layers_of_one_input_when_joined_give_what_they_give_alone(compiled: bool, copies: bool) -> None:
    torch._dynamo.reset()
    alone, joined = _Attention(), _Attention()
    for block in (alone, joined):
        assert use_wide_products([block], torch.bfloat16) == 4
    assert join_trained_siblings(joined) == 1
    assert add_within_products([joined]) == 4
    if copies:
        assert keep_copies([joined], torch.bfloat16) == 2 * sum(p.numel() for p in joined.parameters() if p.dim() == 2)
    run = torch.compile(joined, backend="aot_eager", fullgraph=True, dynamic=True) if compiled else None
    for _ in range(3):  # gradients are added up
        expected, found = _run(alone), _run(joined, run)
        assert len(expected) == len(found) == 8
        for one, other in zip(expected, found, strict=True):
            assert one.dtype == other.dtype
            assert float((one - other).abs().max()) <= 1e-2 * float(one.abs().max())
        assert all(p.grad is not None and p.grad.is_contiguous() for p in joined.parameters())


def test_gradients_of_joined_layers_when_somebody_else_made_them_are_added_to_all_the_same() -> None:
    alone, joined = _Attention(), _Attention()
    for block in (alone, joined):
        use_wide_products([block], torch.bfloat16)
        _run(block)
    join_trained_siblings(joined)
    add_within_products([joined])
    memory = torch.zeros(200, 24)
    for block in (alone, joined):  # neighbours by chance, in memory of their own or not
        layers = (block.q_proj, block.k_proj, block.v_proj)
        for layer, place in zip(
            layers, (memory[:40], memory[40:56].clone(), memory[56:72].t().contiguous().t()), strict=True
        ):
            assert layer.weight.grad is not None
            layer.weight.grad = (
                place.copy_(layer.weight.grad).clone() if block is alone else place.copy_(layer.weight.grad)
            )
    for one, other in zip(_run(alone), _run(joined), strict=True):
        assert float((one - other).abs().max()) <= 1e-2 * float(one.abs().max())


def test_joined_layers_when_one_is_left_apart_are_not_joined() -> None:
    block = _Attention()
    use_wide_products([block], torch.bfloat16)
    assert join_trained_siblings(block, apart=frozenset({"k_proj"})) == 0
    with torch.autocast("cpu", torch.bfloat16):
        block.q_proj(_input()).clamp_(-1, 1).sum().backward()  # the result of one layer may be written in place


def _adamw(parameters: Any, **settings: bool) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.1, **settings)


@pytest.mark.parametrize("settings", [{"foreach": False}, {"foreach": True}, {"fused": True}])
def test_copies_when_torch_writes_the_masters_are_made_again(settings: dict[str, bool]) -> None:
    plain, kept = _Attention(), _Attention()
    for block in (plain, kept):
        use_wide_products([block], torch.bfloat16)
        join_trained_siblings(block)
    keep_copies([kept], torch.bfloat16)
    steps = [_adamw(block.parameters(), **settings) for block in (plain, kept)]
    for number in range(4):
        expected, found = _run(plain), _run(kept)
        for one, other in zip(expected, found, strict=True):
            assert torch.equal(one, other)
        for step in steps:
            step.step()
        assert copy_of(kept.k_proj.weight) is None  # nobody must write it: it is made anew when it is used
        if number == 1:
            for block in (plain, kept):
                block.load_state_dict(_Attention().state_dict())
                block.zero_grad()


class _Writer(torch.optim.Optimizer):
    """Doubles a weight and its copy as a kernel does: torch does not count it."""

    def __init__(self, weight: nn.Parameter, *, writes_copy: bool) -> None:
        super().__init__([weight], {})
        self._weight, self._writes_copy = weight, writes_copy

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        part = copy_of(self._weight) if self._writes_copy else None
        self._weight.data.mul_(2)
        if part is not None:
            assert part.shape == self._weight.shape
            assert part.is_contiguous()
            part.fill_(0.5)


def test_copies_when_an_optimizer_writes_them_are_what_is_multiplied() -> None:
    found: list[Tensor] = []
    for writes_copy in (False, True):
        block = _Attention()
        use_wide_products([block], torch.bfloat16)
        join_trained_siblings(block)
        keep_copies([block], torch.bfloat16)
        _run(block)
        _Writer(block.v_proj.weight, writes_copy=writes_copy).step()
        found.append(_run(block)[0])
        exact = _Attention()
        exact.load_state_dict(block.state_dict())
        if writes_copy:
            nn.init.constant_(exact.v_proj.weight, 0.5)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(found[-1], exact(_input()).detach(), rtol=2e-2, atol=2e-2)
        _Writer(block.v_proj.weight, writes_copy=False).step()  # once more, and nobody writes the copy
        assert copy_of(block.v_proj.weight) is None
    assert not torch.allclose(*found, rtol=0.1, atol=0.1)
    assert copy_of(torch.zeros(3)) is None
    assert copy_of(block.q_proj.bias) is None


def test_copies_when_their_layers_are_gone_are_gone() -> None:
    block = _Attention()
    use_wide_products([block], torch.bfloat16)
    keep_copies([block], torch.bfloat16)
    _run(block)
    weight = block.o_proj.weight
    assert copy_of(weight) is not None
    del block
    gc.collect()
    assert copy_of(weight) is None
