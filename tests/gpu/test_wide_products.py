"""Products of wide masters on a GPU: gradients are written in fp32, not rounded on the way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fourfold.models.masters import add_within_products, copy_of, keep_copies, use_wide_products
from fourfold.training.optimizers.adamw_torch import AdamW

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),  # as an error, what torch's compiler warns of would end it
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [64, 1000])
def test_gradients_of_masters_when_products_are_narrow_are_not_rounded(compute: torch.dtype, tokens: int) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(256, 384, bias=False, device="cuda")
    assert use_wide_products([layer], compute) == 1
    x = torch.randn(2, tokens // 2, 256, device="cuda", dtype=compute, requires_grad=True)
    grad = torch.randn(2, tokens // 2, 384, device="cuda", dtype=compute)
    with torch.autocast("cuda", compute):
        out = layer(x)
    assert out.dtype == compute
    out.backward(grad)
    flat_x, flat_grad = x.detach().double().flatten(0, 1), grad.double().flatten(0, 1)
    narrow = layer.weight.detach().to(compute).double()
    for found, exact, near in (
        (out.detach().flatten(0, 1), flat_x @ narrow.t(), 1e-2),
        (x.grad, (flat_grad @ narrow).view(x.shape), 1e-2),
        (layer.weight.grad, flat_grad.t() @ flat_x, 1e-5),
    ):
        assert found is not None
        assert float((found.double() - exact).abs().max()) <= near * float(exact.abs().max())
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_of_masters_when_there_are_several_micro_batches_take_no_second_place(compiled: bool) -> None:
    torch.manual_seed(0)
    size = 8192
    layer = nn.Linear(size, size, bias=False, device="cuda")
    assert use_wide_products([layer], torch.bfloat16) == add_within_products([layer]) == 1
    run = torch.compile(layer, dynamic=True, fullgraph=True) if compiled else layer
    places: list[int] = []
    inputs: list[Tensor] = []
    for number in range(4):
        x, grad = torch.randn(2, 128, size, device="cuda").bfloat16()
        x.requires_grad_()
        with torch.autocast("cuda", torch.bfloat16):
            out = run(x)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out.backward(grad)
        inputs += [x.detach(), grad]
        assert layer.weight.grad is not None
        places.append(layer.weight.grad.data_ptr())
        if number > 1:  # libraries have their memory by now; the copy of the weight takes half of a gradient
            assert torch.cuda.max_memory_allocated() - before < layer.weight.nbytes
    assert len(set(places)) == 1
    exact = sum(grad[:, :64].double().t() @ x.double() for x, grad in zip(inputs[::2], inputs[1::2], strict=True))
    assert isinstance(exact, Tensor)
    assert float((layer.weight.grad[:64].double() - exact).abs().max()) <= 1e-5 * float(exact.abs().max())


def test_copies_when_the_optimizer_writes_them_are_the_masters_rounded() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(1024, 2048, bias=False, device="cuda")
    small = nn.Linear(64, 64, bias=False, device="cuda")  # torch's own kernel updates it
    layers = [layer, small]
    use_wide_products(layers, torch.bfloat16)
    assert keep_copies(layers, torch.bfloat16) == 2 * (layer.weight.numel() + small.weight.numel())
    optimizer = AdamW([layer.weight, small.weight], lr=1e-2, fused=True)
    for _ in range(3):
        for each in layers:
            x = torch.randn(32, each.in_features, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            with torch.autocast("cuda", torch.bfloat16):
                out = each(x)
            assert torch.equal(out, x.detach() @ each.weight.detach().bfloat16().t())
            out.float().square().mean().backward()
        optimizer.step()
        kept = copy_of(layer.weight)
        assert kept is not None  # written along, so that nobody has to make it again
        assert torch.equal(kept, layer.weight.detach().bfloat16())
        assert copy_of(small.weight) is None
        optimizer.zero_grad()
