"""AdamW that scales gradients by itself, on a CPU: torch's fused AdamW on scaled gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fourfold.config.load import load
from fourfold.parallel.reduce import clip_gradients, gradient_norm
from fourfold.training.clipping import ScalesGradients, clip_for
from fourfold.training.optimizers import adamw_torch
from fourfold.training.precision import LossScaler

_SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}


def _parameters(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((7, 5), (3,))]


def _set_gradients(parameters: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = 3 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("settings", [{"fused": True}, {"foreach": True}], ids=["fused", "saved-as-foreach"])
@pytest.mark.parametrize("max_norm", [0.5, 0.0])
def test_step_when_given_a_factor_equals_clipping_first(settings: dict[str, Any], max_norm: float) -> None:
    ours, theirs = _parameters(), _parameters()
    optimizer = adamw_torch.AdamW(ours, fused=True, **_SETTINGS)
    for group in optimizer.param_groups:
        group |= {"fused": None, **settings}
    reference = torch.optim.AdamW(theirs, **settings, **_SETTINGS)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=5)  # wraps `step`
    reference_schedule = torch.optim.lr_scheduler.LinearLR(reference, total_iters=5)
    for seed in range(4):
        _set_gradients(ours, seed)
        _set_gradients(theirs, seed)
        norm = clip_for(optimizer, ours, max_norm, gradient_norm)
        assert float(norm) == float(clip_gradients(theirs, max_norm))
        optimizer.step()
        schedule.step()
        reference.step()
        reference_schedule.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_step_when_no_factor_is_handed_over_scales_nothing() -> None:
    ours, theirs = _parameters(), _parameters()
    optimizer, reference = (
        adamw_torch.AdamW(ours, fused=True, **_SETTINGS),
        torch.optim.AdamW(theirs, fused=True, **_SETTINGS),
    )
    for seed, factor in enumerate((0.5, None)):
        _set_gradients(ours, seed)
        _set_gradients(theirs, seed)
        if factor is not None:  # holds for one step
            optimizer.scale_gradients_by(torch.tensor(factor))
            for parameter in theirs:
                parameter.grad = factor * parameter.grad  # type: ignore[operator]
        optimizer.step()
        reference.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("overflows", [False, True])
def test_step_when_the_loss_is_scaled_skips_an_overflow_only(overflows: bool) -> None:
    scaler = LossScaler(torch.device("cpu"))
    ours, theirs = _parameters(), _parameters()
    optimizer = adamw_torch.AdamW(ours, fused=True, **_SETTINGS)
    _set_gradients(theirs, 0)
    _set_gradients(ours, 0)
    for parameter in ours:
        assert parameter.grad is not None
        parameter.grad *= scaler.get_scale()
    if overflows:
        assert ours[0].grad is not None
        ours[0].grad[0, 0] = torch.inf
    else:
        reference = torch.optim.AdamW(theirs, fused=True, **_SETTINGS)
        clip_gradients(theirs, 0.5)
        reference.step()
    scaler.unscale_(optimizer)
    clip_for(optimizer, ours, 0.5, gradient_norm)
    scaler.step(optimizer)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
        assert float(optimizer.state[one]["step"]) == 1 - overflows


def test_state_when_moved_to_torchs_and_back_is_the_same() -> None:
    parameters = _parameters()
    optimizer = adamw_torch.AdamW(parameters, fused=True, **_SETTINGS)
    _set_gradients(parameters, 0)
    optimizer.step()
    other = torch.optim.AdamW(_parameters(), fused=True, **_SETTINGS)
    other.load_state_dict(optimizer.state_dict())
    back = adamw_torch.AdamW(_parameters(), fused=True, **_SETTINGS)
    back.load_state_dict(other.state_dict())
    for number, state in optimizer.state_dict()["state"].items():
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(value, back.state_dict()["state"][number][key]) for key, value in state.items())


def test_kernel_numbers_when_computed_have_exact_corrections() -> None:
    steps = [torch.tensor(1.0), torch.tensor(2.0)]
    found = adamw_torch.kernel_numbers(
        steps, lr=0.5, beta1=0.75, beta2=0.96875, factor=torch.tensor(0.25), found_inf=torch.tensor(1.0)
    )
    # 1 - 0.75 = 1/4, 1 - 0.75^2 = 7/16; 1 - 31/32 = 1/32, 1 - (31/32)^2 = 63/1024
    expected = [[2.0, 32**0.5, 0.25, 1.0], [8 / 7, 32 / 63**0.5, 0.25, 1.0]]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-7, atol=0)
    plain = adamw_torch.kernel_numbers(steps, lr=0.5, beta1=0.75, beta2=0.96875, factor=None, found_inf=None)
    assert plain[:, 2:].tolist() == [[1.0, 0.0], [1.0, 0.0]]


@pytest.mark.parametrize("keys", [{}, {"optim_args": {"amsgrad": True}}, {"optim_args": {"foreach": False}}])
def test_build_when_not_on_cuda_gives_torchs_own(keys: dict[str, Any]) -> None:
    optimizer = adamw_torch.build([{"params": _parameters()}], nn.Module(), load(keys))
    assert type(optimizer) is torch.optim.AdamW
    assert not isinstance(optimizer, ScalesGradients)


class _Counter(torch.optim.SGD):
    """Notes the gradients it was given."""

    seen: list[Tensor]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.seen = [p.grad.clone() for group in self.param_groups for p in group["params"]]


def test_clip_for_when_the_optimizer_takes_no_factor_scales_in_place() -> None:
    parameters, others = _parameters(), _parameters()
    _set_gradients(parameters, 0)
    _set_gradients(others, 0)
    optimizer = _Counter(parameters)
    clip_for(optimizer, parameters, 0.5, gradient_norm)
    clip_gradients(others, 0.5)
    optimizer.step()
    assert all(torch.equal(seen, other.grad) for seen, other in zip(optimizer.seen, others, strict=True))
