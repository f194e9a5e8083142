"""Training does not depend on what the host keeps: activations, the optimizer's state, or the weights."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Case, Curve, alone, assert_same, make_model, under
from torch import nn

from fourfold.base.errors import ConfigError, PlanError
from fourfold.config.load import load
from fourfold.models.targets import decoder_blocks
from fourfold.models.unwrap import base_model
from fourfold.parallel import host_adamw
from fourfold.parallel.offload import offload_activations
from fourfold.planning.layout import Layout
from fourfold.training.machines import choose_layout

CASES = {"llama-full": Case(), "llama-lora": Case(tuning="lora")}


@pytest.fixture(scope="module")
def references() -> dict[str, Curve]:
    """The curves of one process that offloads nothing."""
    torch.set_num_threads(1)
    return {name: alone(case) for name, case in CASES.items()}


@pytest.mark.parametrize("case", sorted(CASES))
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_training_when_activations_are_offloaded_equals_without(
    recompute: str, case: str, references: dict[str, Curve]
) -> None:
    offloaded = replace(CASES[case], recompute=recompute, offload_activations=True)
    assert_same(alone(offloaded), references[case], loss=1e-6)


def test_offload_when_activations_move_leaves_weights() -> None:
    module = make_model(Case())
    inner = base_model(module)
    ids = torch.arange(64)[None]
    moved = {}
    for smallest in (0, 1 << 13, 1 << 40):
        model = copy.deepcopy(inner)
        copies = offload_activations(model, list(decoder_blocks(model)[1]), smallest=smallest)
        model(input_ids=ids, use_cache=False).logits.sum().backward()
        moved[smallest] = copies.moved_bytes
    assert moved[0] > moved[1 << 13] > moved[1 << 40] == 0
    weights = sum(parameter.nbytes for parameter in inner.parameters())
    kept = _saved_bytes(inner, ids)
    assert moved[0] <= kept - 0.5 * weights  # a backward pass keeps nearly every weight


def _saved_bytes(model: nn.Module, ids: torch.Tensor) -> int:
    total = 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        total += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        model(input_ids=ids, use_cache=False)
    return total


@pytest.mark.parametrize(
    ("layout", "case"),
    [
        (Layout(dp_shard=2, offload="params"), "llama-full"),
        (Layout(dp_shard=2, offload="params"), "llama-lora"),
        (Layout(dp_shard=2, offload="optimizer"), "llama-full"),
        (Layout(dp_replicate=2, offload="optimizer"), "llama-full"),
        (Layout(dp_shard=2, zero=3, reshard=False), "llama-full"),
    ],
    ids=str,
)
def test_training_when_split_and_offloaded_equals_one_process(
    layout: Layout, case: str, references: dict[str, Curve]
) -> None:
    curves = under(CASES[case], layout)
    for curve in curves:
        assert_same(curve, references[case])
    if layout.offload == "optimizer" and layout.dp_shard > 1:  # each rank has the state of its own shards
        assert sum(curve.state_numel for curve in curves) == references[case].state_numel


@pytest.mark.parametrize("in_files", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_when_on_the_host_updates_as_torch_does(
    in_files: bool, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_adamw, "PIECE", 64)
    generator = torch.Generator().manual_seed(1)
    shapes = ((30, 7), (5,), (0, 4), (3, 4, 5))
    ours = [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]
    ours.append(nn.Parameter(torch.randn((6, 9), generator=generator, dtype=dtype).t()))  # not contiguous
    theirs = [nn.Parameter(parameter.detach().float()) for parameter in ours]
    settings = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    optimizer = host_adamw.AdamW([{"params": ours}], folder=tmp_path if in_files else None, **settings)
    reference = torch.optim.AdamW(theirs, **settings)
    for _ in range(4):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=generator, dtype=dtype)
            other.grad = one.grad.float()
        optimizer.step()
        reference.step()
    for one, other in zip(ours, theirs, strict=True):
        # in bf16 each update is rounded to the weight's own precision
        tolerance = 1e-6 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(one.float(), other, rtol=tolerance, atol=tolerance)
        for name in ("exp_avg", "exp_avg_sq"):
            state = optimizer.state[one][name]
            assert (state.dtype, state.device.type, state.shape) == (torch.float32, "cpu", one.shape)
            torch.testing.assert_close(state, reference.state[other][name], rtol=1e-6, atol=1e-6)
    assert not list(tmp_path.iterdir())  # the files have no names


def test_adamw_when_the_folder_cannot_hold_the_state_says_so(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("", encoding="utf-8")
    settings = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    with pytest.raises(ConfigError, match=r"parallel.offload_folder: .*file cannot hold .*0.78 KiB more"):
        host_adamw.AdamW([{"params": [nn.Parameter(torch.zeros(200))]}], folder=file, **settings)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"parallel": {"offload": "params"}}, "parallel.offload: params works on shards only"),
        ({"strategy": "zero2", "parallel": {"reshard_after_forward": True}}, "frees the weights that strategy: zero2"),
        ({"parallel": {"tp": 2}}, "tp 2 make 2 ranks, but there is 1 process."),
    ],
)
def test_layout_when_one_process_cannot_have_it_says_so(keys: dict[str, Any], message: str) -> None:
    run = load({"model_name_or_path": "m", "output_dir": "o", "dataset": "d", **keys}, verb="train")
    with pytest.raises(PlanError, match=re.escape(message)):
        choose_layout(run, 1)
