"""A rank run without its partners: on real tensors and on fake ones it holds the same."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

import fourfold.training.rehearse as rehearsing
from fourfold.config.load import load
from fourfold.models.unwrap import base_model
from fourfold.planning.layout import Layout
from fourfold.training.build import Built
from fourfold.training.rehearse import Workload, rehearse
from tiny_models import save_tiny_model

_SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 512,
}
_EXPERTS: dict[str, Any] = {"num_experts": 8, "moe_intermediate_size": 64, "num_experts_per_tok": 2}
_TUNINGS: dict[str, dict[str, Any]] = {
    "full": {"finetuning_type": "full", "bf16": True},
    "lora": {"bf16": True},
    "qlora": {"bf16": True, "quantization_bit": 4},
    "reward": {"bf16": True, "stage": "rm"},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "llama": save_tiny_model(root / "llama", "llama", **_SIZES),
        "deep": save_tiny_model(root / "deep", "llama", **{**_SIZES, "num_hidden_layers": 4}),
        "tied": save_tiny_model(root / "tied", "llama", **_SIZES, tie_word_embeddings=True),
        "experts": save_tiny_model(root / "experts", "qwen3_moe", **_SIZES, **_EXPERTS),
    }


@pytest.mark.parametrize(
    ("model", "tuning", "layout", "rank"),
    [
        ("llama", "full", Layout(), 0),
        ("llama", "qlora", Layout(tp=2), 1),
        ("llama", "full", Layout(cp=2, cp_shards=True), 0),
        ("llama", "full", Layout(pp=2), 0),
        ("tied", "full", Layout(dp_replicate=2, pp=2), 3),
        ("llama", "full", Layout(dp_shard=2, tp=2, pp=2), 5),
        ("experts", "lora", Layout(dp_shard=4, ep=4), 0),
        ("llama", "reward", Layout(dp_shard=2), 0),
        ("llama", "reward", Layout(cp=2, pp=2), 3),
    ],
    ids=lambda value: value.describe().replace(" ", "") if isinstance(value, Layout) else str(value),
)
def test_rehearse_on_a_device_steps_and_holds_what_fake_tensors_tell(
    model: str, tuning: str, layout: Layout, rank: int, folders: dict[str, Path]
) -> None:
    run = load({"model_name_or_path": str(folders[model]), **_TUNINGS[tuning]})
    workload = Workload((64, 32), 4)
    real = rehearse(run, layout, workload, rank=rank, recompute="full", device=torch.device("cpu"))
    fake = rehearse(run, layout, workload, rank=rank, recompute="full")
    assert (real.parameters, real.gradients, real.optimizer) == (fake.parameters, fake.gradients, fake.optimizer)
    assert real.tokens == fake.tokens == 4 * 96
    assert real.step_s is not None
    assert real.step_s > 0
    assert fake.step_s is None
    assert fake.peak.total > fake.parameters + fake.optimizer


def test_rehearse_when_experts_are_chosen_more_often_takes_more(folders: dict[str, Path]) -> None:
    run = load({"model_name_or_path": str(folders["experts"]), **_TUNINGS["lora"]})
    layout = Layout(dp_shard=4, ep=4)
    even, twice = (rehearse(run, layout, Workload((512,), expert_load=load)).peak.total for load in (1.0, 2.0))
    assert even < twice


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_rehearse_when_layers_are_spared_keeps_more_and_computes_less_again(
    tuning: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    forward = LlamaMLP.forward

    def counted(self: Any, x: Any) -> Any:
        calls[-1] += 1
        return forward(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", counted)
    run = load({"model_name_or_path": str(folders["llama"]), **_TUNINGS[tuning]})
    peaks = []
    for spared in range(_SIZES["num_hidden_layers"]):
        calls.append(0)
        peaks.append(rehearse(run, Layout(), Workload((512,)), recompute="full", spared=spared).peak.total)
    calls.append(0)
    peaks.append(rehearse(run, Layout(), Workload((512,))).peak.total)
    layers, steps = _SIZES["num_hidden_layers"], 2
    assert [count - calls[-1] for count in calls[:-1]] == [steps * (layers - spared) for spared in range(layers)]
    assert peaks == sorted(peaks)
    assert peaks[0] < peaks[-1]


def test_rehearse_when_stages_send_by_groups_of_their_own_takes_as_much(folders: dict[str, Path]) -> None:
    run = load({"model_name_or_path": str(folders["deep"]), **_TUNINGS["lora"]})
    layouts = [Layout(pp=2, pp_schedule="interleaved_1f1b", pp_overlap_p2p=apart) for apart in (False, True)]
    one, other = (rehearse(run, layout, Workload((64,), 4)).peak.total for layout in layouts)
    assert one == other


def test_build_when_a_pipeline_cuts_packed_layers_away_lets_go_of_them(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    layers: list[weakref.ref[torch.nn.Module]] = []
    build = rehearsing.build

    def watched(run: Any, precision: Any, mesh: Any, module: Any, fill: Any) -> Built:
        names = [f"layers.{index}.mlp.down_proj.base_layer" for index in (0, 1)]  # in a cycle with their weights
        inner = base_model(module).get_submodule("model")
        layers.extend(weakref.ref(inner.get_submodule(name)) for name in names)
        built = build(run, precision, mesh, module, fill)
        gc.disable()  # what is not freed by now stays
        return built

    monkeypatch.setattr(rehearsing, "build", watched)
    run = load({"model_name_or_path": str(folders["llama"]), **_TUNINGS["qlora"]})
    try:
        rehearse(run, Layout(pp=2), Workload((64,), 2), device=torch.device("cpu"))
        alive = [layer() is not None for layer in layers]
    finally:
        gc.enable()
    assert alive == [True, False]
