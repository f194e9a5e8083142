"""Products in float8: those of the rounded operands, near those of the operands themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fourfold.models.compiled import compile_layers
from fourfold.models.float8 import Float8Linear, use_float8
from fourfold.models.trained_linear import join_trained_siblings


def _rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """What is left of numbers in a float8 format, scaled by the largest of them; in float64."""
    scale = values.abs().amax().double() / torch.finfo(dtype).max
    return (values.double() / scale).float().to(dtype).double() * scale


@pytest.mark.parametrize("master", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_layer_when_in_float8_multiplies_the_rounded_operands(master: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(48, 32, bias=bias).to(master)
    assert use_float8([layer]) == 1
    x = torch.randn(2, 16, 48).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    grad = torch.randn_like(out)
    out.backward(grad)
    rows, of_out = x.detach().reshape(-1, 48), grad.reshape(-1, 32)
    weight = _rounded(layer.weight.detach(), torch.float8_e4m3fn)
    narrow_x, narrow_grad = _rounded(rows, torch.float8_e4m3fn), _rounded(of_out, torch.float8_e5m2)
    offset = layer.bias.detach().bfloat16().double() if bias else 0.0
    expected = [narrow_x @ weight.T + offset, narrow_grad @ weight, narrow_grad.T @ narrow_x]
    assert x.grad is not None
    assert layer.weight.grad is not None
    assert (out.dtype, layer.weight.grad.dtype) == (torch.bfloat16, master)
    for found, exact in zip(
        [out.detach().reshape(-1, 32), x.grad.reshape(-1, 48), layer.weight.grad], expected, strict=True
    ):
        assert float((found.double() - exact).abs().max()) <= 1e-2 * float(exact.abs().max())  # rounded to bf16
    plain = rows.double() @ layer.weight.detach().double().T + offset
    assert 1e-3 < float((out.detach().reshape(-1, 32).double() - plain).abs().mean() / plain.abs().mean()) < 6e-2


def test_layers_when_they_are_frozen_or_of_other_sizes_stay_as_they_are() -> None:
    block = nn.ModuleDict({"fits": nn.Linear(32, 48), "odd": nn.Linear(24, 48), "frozen": nn.Linear(32, 48)})
    block["frozen"].weight.requires_grad_(False)  # type: ignore[union-attr]
    assert use_float8([block]) == 1
    assert type(block["fits"]) is Float8Linear
    assert {type(block["odd"]), type(block["frozen"])} == {nn.Linear}
    shared = nn.ModuleDict({"wide": nn.Linear(64, 32), "narrow": nn.Linear(64, 16)})
    assert use_float8([shared], parts=2) == 1
    assert type(shared["wide"]) is Float8Linear


class _Attention(nn.Module):
    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        sizes = {"q_proj": 48, "k_proj": 16, "v_proj": 32}
        for name, size in sizes.items():
            setattr(self, name, nn.Linear(32, size, bias=bias))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x), 3 * self.v_proj(x)], -1)


@pytest.mark.parametrize("bias", [False, True])
def test_layers_of_one_input_when_joined_multiply_as_one_layer_of_all_their_weights(bias: bool) -> None:
    torch.manual_seed(0)
    block = _Attention(bias=bias)
    whole = nn.Linear(32, 96, bias=bias)
    layers = [block.q_proj, block.k_proj, block.v_proj]
    with torch.no_grad():
        whole.weight.copy_(torch.cat([layer.weight for layer in layers]))
        if bias:
            whole.bias.copy_(torch.cat([layer.bias for layer in layers]))
    assert (use_float8([block]), use_float8([whole]), join_trained_siblings(block)) == (3, 1, 1)
    results: list[list[Tensor]] = []
    for module, factors in ((block, 1.0), (whole, torch.tensor([1.0] * 64 + [3.0] * 32).bfloat16())):
        x = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = module(x) * factors
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(2)))
        found = [p for p in module.parameters() if p.ndim == 2]
        results.append([out.detach(), x.grad, torch.cat([p.grad for p in found])])  # type: ignore[list-item, misc]
    for one, other in zip(*results, strict=True):
        assert torch.equal(one.float(), other.float())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(block(x), results[0][0])  # as evaluation runs it


class _Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.down = nn.Linear(32, 48, bias=False), nn.Linear(48, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.silu(self.gate(x)))


@pytest.mark.filterwarnings("default")  # as an error, what torch's compiler warns of would end it
def test_layers_when_compiled_in_float8_share_one_function() -> None:
    def passes(compiled: bool) -> list[Tensor]:
        torch.manual_seed(0)
        layers = nn.Sequential(_Gated(), _Gated(), _Gated())
        assert use_float8(layers) == 6
        if compiled:
            torch._dynamo.reset()
            compile_layers(list(layers), backend="aot_eager")
        found: list[Tensor] = []
        for tokens in (16, 48, 32):
            x = torch.randn(1, tokens, 32, generator=torch.Generator().manual_seed(tokens)).bfloat16()
            with torch.autocast("cpu", torch.bfloat16):
                out = layers(x.requires_grad_())
            out.float().square().mean().backward()
            found.append(out.detach())
        return [*found, *(p.grad for p in layers.parameters() if p.grad is not None)]

    expected = passes(compiled=False)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    found = passes(compiled=True)
    assert len(found) == 9
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one, other)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 1
