"""What the planner is told of a loaded run, and what it says of the memory that a step takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fourfold.config.load import load
from fourfold.planning.activations import kept
from fourfold.planning.hardware import build_cluster
from fourfold.planning.job import Recompute
from fourfold.planning.keeps import NOTHING, Keeps
from fourfold.planning.layout import Layout
from fourfold.training.outlook import Outlook, cluster_of_job
from fourfold.training.step_sizes import StepSizes
from tiny_models import FAMILIES, tiny_config, tiny_model

Look = Callable[..., Outlook]


@pytest.fixture
def look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Look:
    """The outlook of a LoRA run on a tiny model."""
    monkeypatch.setenv("FOURFOLD_CACHE", str(tmp_path / "cache"))

    def make(
        family: str = "llama", layout: Layout | None = None, num_hidden_layers: int | None = None, **keys: Any
    ) -> Outlook:
        layers = {} if num_hidden_layers is None else {"num_hidden_layers": num_hidden_layers}
        tiny_config(family, **layers).save_pretrained(tmp_path / family)
        given = {"model_name_or_path": str(tmp_path / family), "dataset": "d", "output_dir": "o", "bf16": True, **keys}
        run, layout = load(given, verb="train"), layout or Layout()
        sizes = StepSizes(longest=64, step=400, smallest=200, mean=300.0)
        cluster = build_cluster("h100", layout.world_size)
        return Outlook.of(run, tiny_model(family), layout, cluster, sizes, packed=True, document=30.0)

    return make


def _free(step: int) -> int:
    """Bytes that must be free for a step to take so many."""
    return math.ceil(step / 0.93)


def test_outlook_when_made_has_the_real_lengths(look: Look) -> None:
    outlook = look(layout=Layout(dp_replicate=4), cutoff_len=2048)
    assert outlook.job.sequence == 30
    assert outlook.job.tokens_per_step == 4 * 300
    assert outlook.heaviest.tokens_per_step == pytest.approx(4 * 400, abs=29)


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_layers_when_there_is_room_are_spared(look: Look, family: str, recompute: Recompute) -> None:
    outlook, tokens = look(family, num_hidden_layers=6), 100_000
    least, most = outlook.to_come(recompute, tokens), outlook.to_come("none", tokens)
    rooms = (least - 1, least, (least + most) // 2, 2 * most)
    found = [outlook.what_fits(recompute, tokens, _free(room)) for room in rooms]
    assert [each.spared for each in found[:2]] == [0, 0]
    assert 1 <= found[2].spared <= 3
    assert found[3].spared == 5
    sparing = outlook.keeping(found[2])
    assert least < sparing.to_come(recompute, tokens) <= (least + most) // 2
    assert sparing.memory(recompute, tokens).allocated > outlook.memory(recompute, tokens).allocated
    assert outlook.cost("none", tokens).step_s < sparing.cost(recompute, tokens).step_s
    assert sparing.cost(recompute, tokens).step_s < outlook.cost(recompute, tokens).step_s
    assert outlook.what_fits("none", tokens, _free(2 * most)) == NOTHING
    assert outlook.what_fits(recompute, tokens, _free(2 * most), spares=False) == NOTHING


def test_layers_when_they_are_of_a_pipeline_are_not_spared(look: Look) -> None:
    outlook = look(layout=Layout(pp=2), num_hidden_layers=6)
    assert outlook.what_fits("full", 100_000, 1 << 50) == NOTHING


def test_layers_when_most_are_frozen_are_not_spared(look: Look) -> None:
    outlook = look(num_hidden_layers=6, finetuning_type="freeze", freeze_trainable_layers=2)
    assert outlook.what_fits("full", 100_000, 1 << 50) == NOTHING


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_bytes_to_come_when_tokens_are_added_grow_by_what_layers_keep(look: Look, recompute: Recompute) -> None:
    outlook = look()
    one, two = (outlook.memory(recompute, tokens).terms for tokens in (100_000, 200_000))
    layers = [kept(outlook.shape, outlook.job, Layout(), kind, trained=False) for kind in outlook.shape.order]
    hidden = 2 * outlook.shape.hidden
    least = sum(layer.of(recompute) for layer in layers)
    # at the peak there may also be four copies of hidden states, and what one layer works with
    most = least + 4 * hidden + layers[0].none + layers[0].working
    assert least <= (two["activations"] - one["activations"]) / 100_000 <= most
    # activations, and what the allocator cannot use of what comes and goes
    assert outlook.to_come(recompute, 200_000) - outlook.to_come(recompute, 100_000) == pytest.approx(
        1.02 * (two["activations"] - one["activations"]), rel=1e-3
    )


def test_bytes_not_seen_when_more_is_trained_than_known_count_its_state(look: Look) -> None:
    outlook = look(lora_rank=4)
    # A and B of rank 4 on q, k, v, o, gate, up and down of two layers, hidden 32, keys 16 and MLP 48 wide; fp32
    known = 2 * 4 * 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))
    assert outlook.not_seen(known) == 0
    assert outlook.not_seen(known + 1000) == 3000


def test_unpacking_when_there_is_room_is_chosen_and_not_otherwise(look: Look) -> None:
    outlook = look(quantization_bit=4)
    outlook = replace(outlook, job=replace(outlook.job, bits=4), heaviest=replace(outlook.heaviest, bits=4))
    unpacked = Keeps(unpacked=True)
    more = outlook.keeping(unpacked).loaded() - outlook.loaded()
    linear = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)  # of two layers
    assert 1.4 * linear < more < 1.5 * linear  # two bytes instead of a half and a scale
    step = outlook.keeping(unpacked).to_come("none", 300)
    assert outlook.what_fits("none", 300, _free(step + more) + 10) == unpacked
    assert outlook.what_fits("none", 300, _free(step + more) - 10) == NOTHING
    for other in (look(), look(quantization_bit=4, memory="low"), look(layout=Layout(dp_shard=2))):
        assert not other.what_fits("none", 300, 2**40).unpacked


def test_logits_when_there_is_room_are_kept_and_not_otherwise(look: Look) -> None:
    outlook = look(finetuning_type="full")
    job, heaviest = (replace(job, engine="compiled") for job in (outlook.job, outlook.heaviest))
    outlook = replace(outlook, job=job, heaviest=heaviest)
    tokens = outlook.job.chunk + 1000
    keeping = outlook.keeping(Keeps(logits=True))
    more = keeping.to_come("none", tokens) - outlook.to_come("none", tokens)
    assert 2 * 1000 * outlook.shape.vocab <= more <= 1.03 * 2 * 1000 * outlook.shape.vocab
    step = keeping.to_come("none", tokens)
    assert outlook.what_fits("none", tokens, _free(step) + 10).logits
    assert not outlook.what_fits("none", tokens, _free(step) - 10).logits
    assert not outlook.what_fits("none", outlook.job.chunk, 2**40).logits  # they are kept anyway
    low = replace(outlook, heaviest=replace(heaviest, host_embedding=True))
    for other in (look(finetuning_type="full"), look(), replace(outlook, layout=Layout(tp=2)), low):
        assert not other.what_fits("none", tokens, 2**40).logits


def test_copies_when_logits_leave_room_are_kept(look: Look) -> None:
    outlook = look(finetuning_type="full")
    job, heaviest = (replace(job, engine="compiled") for job in (outlook.job, outlook.heaviest))
    outlook, tokens = replace(outlook, job=job, heaviest=heaviest), outlook.job.chunk + 1000
    logits = outlook.keeping(Keeps(logits=True))
    copies = outlook.keeping(Keeps(logits=True, copies=True)).loaded() - outlook.loaded()
    assert copies == 2 * 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)  # of the matrices of two layers
    free = _free(logits.to_come("none", tokens) + copies)
    assert outlook.what_fits("none", tokens, free + 10) == Keeps(logits=True, copies=True)
    assert outlook.what_fits("none", tokens, free - 10) == Keeps(logits=True)


def test_bytes_when_the_family_is_any_can_be_told(look: Look) -> None:
    for family in FAMILIES:
        outlook = look(family)
        assert outlook.to_come("none", 400) > outlook.to_come("full", 400) > 0, family
        assert outlook.cost("none", 400).step_s > 0, family


@pytest.mark.parametrize(
    ("env", "world_size", "nodes", "per_node"),
    [
        ({}, 2, 1, 2),
        ({"NNODES": "4"}, 8, 4, 2),
        ({"LOCAL_WORLD_SIZE": "2"}, 6, 3, 2),  # torchrun
    ],
)
def test_cluster_when_torch_sees_gpus_is_made_of_their_kind(
    env: dict[str, str], world_size: int, nodes: int, per_node: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=85_000_000_000)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: card)
    for name in ("NNODES", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    run = load({"model_name_or_path": "m", "dataset": "d", "output_dir": "o"}, verb="train")
    cluster = cluster_of_job(run, world_size)
    assert cluster is not None
    assert (cluster.device.name, cluster.nodes, cluster.per_node) == ("h100", nodes, per_node)
    assert cluster.device.memory_bytes == pytest.approx(85e9, abs=1)


def test_cluster_when_asked_for_cpus_is_none() -> None:
    run = load({"model_name_or_path": "m", "dataset": "d", "output_dir": "o", "use_cpu": True}, verb="train")
    assert cluster_of_job(run, 8) is None
