"""LoRA's short forward pass gives what PEFT's own gives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from functorch.compile import make_boxed_func
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

from fourfold.base.peft import LoraLayer
from fourfold.models import lora
from fourfold.models.lora import LoraLinear, join_siblings, make_room, use_short_forward
from fourfold.models.noise import KeyedDropout, NoiseKeys, hash32
from fourfold.models.wide_rank import takes, widened

_SIZE = 16


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(_SIZE, _SIZE)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def adapted(base: torch.dtype) -> PeftModel:
    """A linear layer in `base` with an adapter in fp32 that changes something."""
    torch.manual_seed(0)
    model = get_peft_model(_Layer().to(base), LoraConfig(r=4, target_modules=["proj"]), autocast_adapter_dtype=False)  # type: ignore[arg-type]
    assert isinstance(model, PeftModel)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape)
    return model


@pytest.mark.parametrize("num_tokens", [5, 80])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_short_forward_when_compared_with_peft_gives_the_same(
    base: torch.dtype, autocast: bool, num_tokens: int
) -> None:
    theirs = adapted(base)
    ours = copy.deepcopy(theirs)
    assert use_short_forward(ours) == 1
    x = torch.randn(2, num_tokens, _SIZE, dtype=base)
    found: list[tuple[Tensor, list[Tensor]]] = []
    for model in (theirs, ours):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(x)
        out.float().square().sum().backward()
        found.append((out.detach(), [p.grad for p in model.parameters() if p.grad is not None]))
    assert isinstance(ours.base_model.model.proj, LoraLinear)  # type: ignore[union-attr]
    (expected, grads), (out, other_grads) = found
    assert out.dtype == expected.dtype
    # relative to the largest value: two roundings to bf16, or fp32 sums in another order
    tolerance = 2e-2 if autocast or base is torch.bfloat16 else 1e-5
    assert len(grads) == len(other_grads) == 2
    for one, other in zip([expected, *grads], [out, *other_grads], strict=True):
        assert float((one - other).abs().max()) <= tolerance * float(one.abs().max())


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_short_forward_when_the_base_is_packed_gives_what_pefts_own_gives(
    compute: torch.dtype, autocast: bool, double: bool
) -> None:
    from bitsandbytes.nn import Linear4bit

    if compute is torch.float32 and autocast:
        pytest.skip("bitsandbytes' layer computes in its own dtype then, and is left alone")
    torch.manual_seed(0)
    size = 128
    plain = nn.Linear(size, size)
    layer = Linear4bit(size, size, compute_dtype=compute, compress_statistics=double, quant_type="nf4")
    layer.load_state_dict(plain.state_dict())
    holder = _Layer()
    holder.proj, holder.is_loaded_in_4bit = layer.to("cpu"), True  # type: ignore[assignment]
    theirs = get_peft_model(holder, LoraConfig(r=4, target_modules=["proj"]), autocast_adapter_dtype=False)  # type: ignore[arg-type]
    adapters = {name: torch.randn(p.shape) for name, p in theirs.named_parameters() if "lora_" in name}
    x = torch.randn(2, 40, size).to(compute)
    found: list[tuple[Tensor, list[Tensor]]] = []
    for short in (False, True):
        assert not short or use_short_forward(theirs) == 1
        for name, parameter in theirs.named_parameters():
            if name in adapters:
                parameter.data, parameter.grad = adapters[name].to(torch.float32 if autocast else compute), None
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = theirs(leaf)
        out.float().square().sum().backward()
        assert leaf.grad is not None
        grads = [p.grad for p in theirs.parameters() if p.grad is not None]
        found.append((out.detach(), [leaf.grad, *grads]))
    assert type(theirs.base_model.model.proj).__name__ == "PackedLoraLinear"  # type: ignore[union-attr]
    (expected, grads), (out, other_grads) = found
    assert out.dtype == expected.dtype
    tolerance = 2e-2 if compute is torch.bfloat16 else 1e-5
    assert len(grads) == len(other_grads) == 3
    for one, other in zip([expected, *grads], [out, *other_grads], strict=True):
        assert float((one - other).abs().max()) <= tolerance * float(one.abs().max())


class _Attention(nn.Module):
    """Five layers of which three have one input; queries wider than keys and values."""

    def __init__(self, make: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = make(_WIDE, 128), make(_WIDE, 64), make(_WIDE, 64)
        self.o_proj, self.down_proj = make(64, _WIDE), make(_WIDE, 64)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.down_proj(self.o_proj(torch.tanh(q[..., :64] * k) + q[..., 64:] * v) * 0.01)


_WIDE = 128
_NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]


def _linear(bias: bool, dtype: torch.dtype) -> Callable[[int, int], nn.Module]:
    return lambda width, out: nn.Linear(width, out, bias=bias, dtype=dtype)


def _packed_linear(bias: bool, dtype: torch.dtype) -> Callable[[int, int], nn.Module]:
    from bitsandbytes.nn import Linear4bit

    def make(width: int, out: int) -> nn.Module:
        layer = Linear4bit(width, out, bias, compute_dtype=dtype, compress_statistics=bias, quant_type="nf4")
        layer.load_state_dict(nn.Linear(width, out, bias, dtype=dtype).state_dict())
        return layer.to("cpu")

    return make


def _attention(make: Callable[[int, int], nn.Module]) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(_Attention(make), LoraConfig(r=4, target_modules=_NAMES), autocast_adapter_dtype=False)  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # as large as the base's part, and so that tanh does not magnify how products round
            parameter.data = 0.1 * torch.randn(parameter.shape)
    assert isinstance(model, PeftModel)
    assert use_short_forward(model) == 5
    return model


def _passes(
    model: PeftModel, autocast: bool, tokens: int = 9, forward: Callable[[Tensor], Tensor] | None = None
) -> list[Tensor]:
    """Results and gradients of two passes, the first without gradients."""
    x = torch.randn(2, tokens, _WIDE, generator=torch.Generator().manual_seed(1)).requires_grad_()
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with torch.no_grad():
            first = model(x + 1)
        out = (model if forward is None else forward)(x)
    out.float().square().sum().backward()
    assert x.grad is not None
    return [first, out.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("make", "autocast"), [(_linear, False), (_linear, True), (_packed_linear, False)])
def test_siblings_when_they_are_one_product_give_what_each_gives_alone(
    make: Callable[[bool, torch.dtype], Callable[[int, int], nn.Module]], autocast: bool, bias: bool
) -> None:
    model = _attention(make(bias, torch.bfloat16 if autocast else torch.float32))
    alone = _passes(model, autocast)
    assert join_siblings(model) == 1
    together = _passes(model, autocast)
    assert len(alone) == len(together) == 13
    for one, other in zip(alone, together, strict=True):
        assert one.dtype == other.dtype
        assert float((one - other).abs().max()) <= (2e-2 if autocast else 2e-6) * float(one.abs().max())


def _dropping(model: PeftModel, step: int = 0) -> PeftModel:
    """A model whose adapters' inputs are dropped by keys of 2 rows of 9 positions."""
    keys = NoiseKeys(seed=3, step=step)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.lora_dropout["default"] = KeyedDropout(0.3, keys)
    keys.tokens = hash32(torch.arange(18, dtype=torch.int32).view(2, 9) + 1000 * step)
    return model


@pytest.mark.parametrize(("make", "autocast"), [(_linear, False), (_linear, True), (_packed_linear, False)])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.filterwarnings("default")
def test_siblings_when_inputs_of_adapters_are_dropped_give_what_pefts_own_gives(
    make: Callable[[bool, torch.dtype], Callable[[int, int], nn.Module]], autocast: bool, compiled: bool
) -> None:
    torch._dynamo.reset()
    model = _dropping(_attention(make(False, torch.bfloat16 if autocast else torch.float32)))
    # in bf16 this model's gradients hang on the order of roundings, and PEFT has another one
    theirs = nullcontext() if autocast else mock.patch.object(lora, "_plain_adapter", return_value=None)
    with theirs:
        expected = _passes(model, autocast)
    assert (join_siblings(model), make_room(model)) == (1, 0)
    run = torch.compile(model.base_model.model.forward, backend="aot_eager", dynamic=True) if compiled else None
    found = _passes(model, autocast, forward=run)
    assert len(expected) == len(found) == 13
    for one, other in zip(expected, found, strict=True):
        assert float((one - other).abs().max()) <= (2e-2 if autocast else 2e-5) * float(one.abs().max())
    assert not torch.allclose(found[1], _passes(_dropping(model, 1), autocast)[1], atol=1e-2)  # the keys matter


@pytest.mark.filterwarnings("default")  # as an error, what torch's compiler warns of would end it
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_siblings_when_wide_and_compiled_give_what_each_gives_alone(autocast: bool, bias: bool) -> None:
    torch._dynamo.reset()
    model = _attention(_linear(bias, torch.bfloat16 if autocast else torch.float32))
    alone = _passes(model, autocast)
    assert (join_siblings(model), make_room(model), make_room(model)) == (1, 3, 0)
    graphs: list[str] = []

    def note(module: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(module.code)
        return make_boxed_func(module.forward)

    for tokens in (9, 5):
        plain = alone if tokens == 9 else _passes(model, autocast, tokens)
        inner, backend = model.base_model.model, aot_autograd(fw_compiler=note)
        compiled = torch.compile(inner.forward, backend=backend, dynamic=True, fullgraph=True)
        together = _passes(model, autocast, tokens, compiled)
        assert len(plain) == len(together) == 13
        for one, other in zip(plain, together, strict=True):
            assert one.dtype == other.dtype
            assert float((one - other).abs().max()) <= (2e-2 if autocast else 5e-5) * float(one.abs().max())
    code = "".join(graphs)
    assert code.count("fourfold.wide_rank.default") == 2 * 2  # of those whose results are wider than their inputs
    assert code.count("fourfold.wide_rank_back.default") == 3 * 2


@pytest.mark.filterwarnings("default")
def test_siblings_when_wide_may_run_twice_before_the_backward_pass_and_with_other_adapters() -> None:
    torch._dynamo.reset()
    model = _attention(_linear(False, torch.float32))
    plain = copy.deepcopy(model)
    assert (join_siblings(model), make_room(model), make_room(model)) == (1, 3, 0)
    run = torch.compile(model.base_model.model.forward, backend="aot_eager", dynamic=True, fullgraph=True)  # type: ignore[union-attr]
    for adapter in ("default", "other"):
        if adapter == "other":
            for each in (plain, model):
                torch.manual_seed(0)
                each.add_adapter("other", LoraConfig(r=40, target_modules=_NAMES, init_lora_weights=False))
                each.set_adapter("other")
        found: list[Tensor] = []
        for forward in (plain, run):
            x = torch.randn(2, 9, _WIDE, generator=torch.Generator().manual_seed(1)).requires_grad_()
            (forward(x).square().sum() + forward(x + 1).sum()).backward()
            assert x.grad is not None
            found.append(x.grad)
        assert float((found[0] - found[1]).abs().max()) <= 5e-5 * float(found[0].abs().max())


@pytest.mark.parametrize(("out", "width", "does"), [(24, 16, True), (8, 16, True), (24, 12, False), (12, 24, False)])
def test_widening_when_rows_would_be_crooked_is_not_for_a_weight(out: int, width: int, does: bool) -> None:
    assert takes(torch.empty(out, width)) == does


def test_operator_of_wide_products_when_checked_by_torch_passes() -> None:
    wide = widened(torch.randn(12, 8), 3)
    assert wide.shape == (44, 40)
    a, b = torch.randn(32, 8), torch.randn(12, 32)
    for bias in (None, torch.randn(12)):
        arguments = (torch.randn(5, 40), wide, bias, b)
        torch.library.opcheck(torch.ops.fourfold.wide_rank, arguments, test_utils="test_faketensor")
    arguments = (torch.randn(5, 44), wide, a, b, torch.randn(5, 8))
    torch.library.opcheck(torch.ops.fourfold.wide_rank_back, arguments, test_utils="test_faketensor")


@pytest.mark.parametrize("widen", [False, True])
def test_siblings_when_joined_stay_layers_of_their_own(widen: bool) -> None:
    model = _attention(_linear(False, torch.float32))
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert join_siblings(model) == 1
    if widen:
        assert make_room(model) == 3
    assert {name for name, _ in model.named_parameters()} == weights.keys()
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    attention: _Attention = model.base_model.model  # type: ignore[assignment]
    x, other = torch.randn(2, 3, _WIDE), torch.randn(2, 3, _WIDE)
    queries, values = attention.q_proj(x), attention.v_proj(x)
    assert torch.allclose(attention.v_proj(x), values, atol=1e-6)  # asked twice
    assert torch.allclose(attention.k_proj(other), attention.k_proj(other.clone()), atol=1e-6)  # of another input
    with model.disable_adapter():
        assert torch.allclose(
            attention.q_proj(x), x @ weights["base_model.model.q_proj.base_layer.weight"].T, atol=1e-5
        )
    merged: _Attention = model.merge_and_unload()  # type: ignore[assignment]
    assert torch.allclose(merged.q_proj(x), queries, atol=1e-4)


def test_siblings_when_they_differ_or_are_left_apart_are_not_joined() -> None:
    assert join_siblings(_attention(_linear(False, torch.float32)), apart=frozenset({"k_proj"})) == 0
    model = _attention(_linear(False, torch.float32))
    model.base_model.model.k_proj.base_layer.weight.requires_grad_()  # type: ignore[union-attr]
    assert join_siblings(model) == 0
    scaled = _attention(_linear(False, torch.float32))
    expected = _passes(scaled, autocast=False)
    join_siblings(scaled)
    largest = float(expected[1].abs().max())
    assert float((_passes(scaled, autocast=False)[1] - expected[1]).abs().max()) <= 2e-6 * largest
    scaled.base_model.model.k_proj.scaling["default"] = 3.0  # type: ignore[union-attr, index, operator]
    assert float((_passes(scaled, autocast=False)[1] - expected[1]).abs().max()) > 1e-2 * largest
