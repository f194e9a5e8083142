"""Recompute and offload on a GPU: the same gradients, in less memory."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from fourfold.models import attention
from fourfold.models.noise import NoiseKeys
from fourfold.models.targets import decoder_blocks
from fourfold.parallel import host_adamw
from fourfold.parallel.offload import offload_activations
from fourfold.parallel.recompute import Recompute
from fourfold.training.memory import enable_recompute
from fourfold.training.precision import narrow_outputs
from tiny_models import tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

_TOKENS = 4096


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """Four layers whose activations outweigh their weights; fp32 masters, computed in bf16 on packed rows."""
    made = tiny_model("llama", hidden_size=256, intermediate_size=1024, num_hidden_layers=4, head_dim=64)
    attention.register()
    made.set_attn_implementation(attention.NAME)
    narrow_outputs(made, torch.bfloat16)
    made.train()
    nn.Module.to(made, "cuda")
    return made


def _step(model: PreTrainedModel, prepare: Callable[[PreTrainedModel], object]) -> tuple[list[torch.Tensor], int]:
    """Gradients of a step, and the peak of what it allocated."""
    model = copy.deepcopy(model)
    prepare(model)
    lengths = (1024, 512, 2048, 512)
    offsets = torch.tensor([0, 1024, 1536, 3584, _TOKENS], dtype=torch.int32, device="cuda")
    ids = torch.arange(_TOKENS, device="cuda")[None] % 300
    positions = torch.cat([torch.arange(length, device="cuda") for length in lengths])[None]
    before = 0
    for _ in range(2):  # the first one warms up, and makes the gradients
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model.zero_grad(set_to_none=False)
        with torch.autocast("cuda", torch.bfloat16):
            hidden = model.get_decoder()(
                input_ids=ids, position_ids=positions, use_cache=False, lengths=lengths, cu_seqlens=offsets
            ).last_hidden_state
        hidden.float().square().sum().backward()
        torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    return [p.grad for p in model.get_decoder().parameters() if p.grad is not None], peak


def _assert_close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).abs().max()) <= 1e-2 * float(other.abs().max())


def test_recompute_when_selective_takes_a_middle_amount_of_memory(model: PreTrainedModel) -> None:
    def prepare(kind: Recompute) -> Callable[[PreTrainedModel], object]:
        return lambda made: None if kind == "none" else enable_recompute(made, kind, NoiseKeys(seed=0))

    kinds: tuple[Recompute, ...] = ("none", "selective", "full")
    found = {kind: _step(model, prepare(kind)) for kind in kinds}
    for kind in ("selective", "full"):
        _assert_close(found[kind][0], found["none"][0])
    assert found["full"][1] < 0.8 * found["selective"][1]
    assert found["selective"][1] < 0.8 * found["none"][1]


def test_offload_when_activations_leave_the_gpu_takes_less_memory(model: PreTrainedModel) -> None:
    def prepare(made: PreTrainedModel) -> None:
        decoder = made.get_decoder()
        offload_activations(decoder, list(decoder_blocks(made)[1]), smallest=1 << 16)

    expected, most = _step(model, lambda made: None)
    found, peak = _step(model, prepare)
    _assert_close(found, expected)
    assert peak < 0.7 * most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_when_weights_are_on_the_gpu_updates_as_torch_does(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_adamw, "PIECE", 1000)
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape, device="cuda", dtype=dtype)) for shape in ((300, 70), (5,), (64, 8, 9))]
    theirs = [nn.Parameter(parameter.detach().float()) for parameter in ours]
    settings = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    optimizer, reference = host_adamw.AdamW([{"params": ours}], **settings), torch.optim.AdamW(theirs, **settings)
    for _ in range(5):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.float()
        optimizer.step()
        reference.step()
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.float(), other, rtol=tolerance, atol=tolerance)
        assert optimizer.state[one]["exp_avg"].device.type == "cpu"


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")
def test_attention_when_masters_are_fp32_takes_the_variable_length_kernel(model: PreTrainedModel) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        _step(model, lambda made: None)
    names = {event.key for event in profile.key_averages()}
    assert any("_varlen_attn" in name for name in names)
    assert not any("scaled_dot_product" in name for name in names)
