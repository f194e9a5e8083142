"""The kernel of the largest few on a GPU, against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from fourfold.base.inductor import teach_inductor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def draw(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers of which no two in a row are equal, in any order."""
    orders = torch.rand(size, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).argsort(-1)
    return ((orders - size[-1] // 2) / 4).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("size", "k"), [((1, 8), 8), ((300, 128), 8), ((2, 77, 32), 4), ((129, 60), 6), ((5, 512), 16)]
)
def test_largest_of_few_are_those_of_torch(size: tuple[int, ...], k: int, dtype: torch.dtype) -> None:
    numbers = draw(*size, dtype=dtype)
    found, expected = torch.ops.fourfold.topk_of_few(numbers, k), torch.topk(numbers, k)
    assert torch.equal(found[0], expected.values)
    assert torch.equal(found[1], expected.indices)


def test_largest_when_numbers_are_equal_or_none_are_still_places_of_the_row() -> None:
    equal = torch.ops.fourfold.topk_of_few(torch.zeros(3, 40, device="cuda"), 4)
    assert equal[1].tolist() == [[0, 1, 2, 3]] * 3
    for value in (float("nan"), float("-inf")):
        _, indices = torch.ops.fourfold.topk_of_few(torch.full((3, 40), value, device="cuda"), 4)
        assert 0 <= int(indices.min()) <= int(indices.max()) < 40


@pytest.mark.filterwarnings("default")  # as an error, what torch's compiler warns of would end it
@pytest.mark.parametrize(("width", "k", "few"), [(128, 8, True), (128, 32, False), (1024, 8, False)])
def test_router_when_compiled_chooses_by_the_kernel_where_there_are_few(width: int, k: int, few: bool) -> None:
    torch._dynamo.reset()
    teach_inductor()

    def choose(logits: Tensor) -> tuple[Tensor, Tensor]:
        values, indices = torch.topk(logits * 2, k, dim=-1)
        return values / values.sum(-1, keepdim=True), indices

    logits = (draw(500, width) + width).requires_grad_()
    expected = choose(logits)
    torch._dynamo.mark_static(logits, 1)  # pyright: ignore[reportPrivateImportUsage]
    compiled = torch.compile(choose, fullgraph=True, dynamic=None)
    found, [code, *_] = run_and_get_code(compiled, logits)
    assert ("topk_of_few" in code) == few
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[0], expected[0])
    grads = [torch.autograd.grad(each[0].square().sum(), logits)[0] for each in (found, expected)]
    torch.testing.assert_close(*grads)
