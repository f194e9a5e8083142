"""The kernel of AdamW, run on the CPU by Triton's interpreter, against torch's AdamW in fp32 and fp64."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

import fourfold.parallel

pytest.importorskip("triton")

_LR, _BETAS, _EPS, _DECAY = 1e-2, (0.9, 0.999), 1e-8, 0.1
_FACTOR = 0.25


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module anew, interpreted, so that others in this process get the compiled one."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    path = Path(fourfold.parallel.__path__[0]) / "adamw_kernel.py"
    spec = importlib.util.spec_from_file_location("interpreted_adamw_kernel", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _numbers(step: int, skip: float = 0.0) -> Tensor:
    beta1, beta2 = (float(torch.tensor(beta)) for beta in _BETAS)
    return torch.tensor([_LR / (1 - beta1**step), (1 - beta2**step) ** -0.5, _FACTOR, skip])


def _update(kernel: ModuleType, tensors: list[Tensor], numbers: Tensor) -> None:
    beta1, beta2 = _BETAS
    kernel.update_adamw(*tensors, numbers, beta1=beta1, beta2=beta2, eps=_EPS, decay=_LR * _DECAY)


def _reference(weight: Tensor, grads: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """What torch's AdamW makes of scaled gradients, in the weight's dtype."""
    parameter = nn.Parameter(weight.clone())
    optimizer = torch.optim.AdamW([parameter], lr=_LR, betas=_BETAS, eps=_EPS, weight_decay=_DECAY, foreach=False)
    for grad in grads:
        parameter.grad = _FACTOR * grad.to(weight.dtype)
        optimizer.step()
    state = optimizer.state[parameter]
    return parameter.detach(), state["exp_avg"], state["exp_avg_sq"]


@pytest.mark.parametrize("num", [1, 1000, 1024, 2048, 3001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_update_adamw_when_repeated_equals_torch(kernel: ModuleType, num: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(num)
    weight = torch.randn(num, generator=generator)
    grads = [torch.randn(num, generator=generator) for _ in range(5)]
    found = [weight.clone(), torch.zeros(num), torch.zeros(num)]
    for step, grad in enumerate(grads, 1):
        kept = grad.clone()
        _update(kernel, [found[0], grad, *found[1:]], _numbers(step))
        assert torch.equal(grad, kept)
    expected = _reference(weight.to(dtype), grads)
    # The second moment has 1 - beta2 with beta2 in fp32, as on CUDA in torch: 1.3e-5 off. The weights do not feel it.
    # They are up to 4 and rounded twice in each of five steps, by up to 1.2e-7.
    tolerances = ((1e-6, 1e-6), (1e-6, 1e-7), (2e-5, 1e-7))
    for one, other, (rtol, atol) in zip(found, expected, tolerances, strict=True):
        torch.testing.assert_close(one, other.float(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("narrow", [(1,), (2, 3), (0, 1, 2, 3)], ids=["grad", "state", "all"])
def test_update_adamw_when_in_bf16_rounds_only_what_is_stored(kernel: ModuleType, narrow: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1500, generator=generator) for _ in range(4)]
    tensors[3] = tensors[3].square()
    tensors = [t.bfloat16() if place in narrow else t for place, t in enumerate(tensors)]
    wide = [tensor.float() for tensor in tensors]
    _update(kernel, tensors, _numbers(7))
    _update(kernel, wide, _numbers(7))
    for one, other in zip(tensors, wide, strict=True):
        # the interpreter cuts bf16 off where a GPU rounds: one step of it
        torch.testing.assert_close(one.float(), other, rtol=2**-7 if one.dtype == torch.bfloat16 else 0, atol=0)


@pytest.mark.parametrize("num", [1000, 2048])
@pytest.mark.parametrize("skip", [0.0, 1.0])
def test_update_adamw_when_given_a_copy_writes_it_with_the_parameter(kernel: ModuleType, num: int, skip: float) -> None:
    generator = torch.Generator().manual_seed(num)
    tensors = [torch.randn(num, generator=generator) for _ in range(3)]
    tensors.append(torch.rand(num, generator=generator))
    alone = [tensor.clone() for tensor in tensors]
    copy = torch.full((num,), 3.0, dtype=torch.bfloat16)
    beta1, beta2 = _BETAS
    kernel.update_adamw(*tensors, _numbers(2, skip), beta1=beta1, beta2=beta2, eps=_EPS, decay=0.1 * _LR, copy=copy)
    _update(kernel, alone, _numbers(2, skip))
    assert all(map(torch.equal, tensors, alone))
    if skip:
        assert torch.equal(copy, torch.full_like(copy, 3.0))
    else:  # the interpreter cuts bf16 off where a GPU rounds
        torch.testing.assert_close(copy.float(), tensors[0], rtol=2**-7, atol=0)


def test_update_adamw_when_skipped_writes_nothing(kernel: ModuleType) -> None:
    tensors = [torch.randn(1030).square() for _ in range(4)]
    tensors[1][5] = torch.inf
    before = [tensor.clone() for tensor in tensors]
    _update(kernel, tensors, _numbers(1, skip=1.0))
    assert all(map(torch.equal, tensors, before))
