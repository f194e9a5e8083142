"""`strategy: auto` on made-up GPUs: the planner's layout is taken, what is given stays, and failing is told."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fourfold.config.load import load
from fourfold.config.schema import Run
from fourfold.planning.hardware import Cluster, build_cluster
from fourfold.planning.layout import Layout
from fourfold.training import auto, machines
from fourfold.training.machines import choose, choose_layout

_MODELS = Path(__file__).parents[3] / "examples" / "models"
_FULL = {"finetuning_type": "full", "bf16": True, "global_batch_size": 64, "per_device_train_batch_size": 2}

Install = Callable[[Cluster], None]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Install:
    """Makes a cluster the one that runs are for."""
    monkeypatch.setenv("FOURFOLD_CACHE", str(tmp_path))

    def install(cluster: Cluster) -> None:
        monkeypatch.setattr(auto, "cluster_of_job", lambda run, world_size: cluster)

    return install


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What is logged, whatever earlier tests set up."""
    monkeypatch.setattr(logging.getLogger("fourfold"), "propagate", True)
    caplog.set_level(logging.INFO, "fourfold")
    return caplog


def _run(model: str, **keys: Any) -> Run:
    given = {"model_name_or_path": str(_MODELS / model), "dataset": "d", "output_dir": "o", "cutoff_len": 4096, **keys}
    return load(given, verb="train")


def test_auto_when_the_whole_fits_takes_replicas_and_says_why(gpus: Install, log: pytest.LogCaptureFixture) -> None:
    gpus(build_cluster("h100", 8))
    choice = choose(_run("SmolLM2-135M", **_FULL), 8)
    assert choice.layout == Layout(dp_replicate=8)
    assert choice.planned is not None
    assert choice.planned.recompute == "none"
    assert 2 <= len(log.messages) <= 4
    paragraph = " ".join(log.messages)
    assert paragraph.startswith(
        "strategy: auto takes dp_replicate 8 on 8 x NVIDIA H100 SXM 80GB, with activations kept"
    )
    assert "Why: the whole fits one GPU" in paragraph
    assert re.search(
        r"a peak of \d+\.\d of 79\.\d GiB on the most loaded GPU, \S+ s a step, [\d,]+ tokens/s", paragraph
    )
    assert "`fourfold plan FILE`" in paragraph


def test_auto_when_the_whole_does_not_fit_shards(gpus: Install, log: pytest.LogCaptureFixture) -> None:
    gpus(build_cluster("h100", 8))
    choice = choose(_run("Llama-3-8B", **_FULL), 8)
    assert choice.layout.shards == 8
    assert choice.planned is not None
    assert choice.planned.layout == choice.layout
    assert choice.planned.micro_batch in (4096, 8192)  # whole sequences, of at most two
    # 8.03 billion parameters with 4 bytes each of weight, gradient and two moments: 120 GiB
    assert re.search(r"the whole needs 1[2-9]\d\.\d GiB", " ".join(log.messages))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"tp": 4}, {"tp": 4}),
        ({"dp_replicate": 2, "tp": 2}, {"dp_replicate": 2, "tp": 2}),
        ({"pp": 2}, {"pp": 2}),
    ],
)
def test_auto_when_sizes_are_given_keeps_them(given: dict[str, int], expected: dict[str, int], gpus: Install) -> None:
    gpus(build_cluster("h100", 8))
    layout = choose_layout(_run("Llama-3-8B", **_FULL, parallel=given), 8)
    assert {name: layout.sizes()[name] for name in expected} == expected
    assert layout.world_size == 8


def test_auto_when_recompute_is_given_plans_with_it(gpus: Install) -> None:
    gpus(build_cluster("h100", 8))
    planned = choose(_run("Llama-3-8B", **_FULL, parallel={"recompute": "full"}), 8).planned
    assert planned is not None
    assert planned.recompute == "full"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_strategy_when_named_is_taken_without_a_plan(strategy: str, gpus: Install) -> None:
    gpus(build_cluster("h100", 8))
    choice = choose(_run("Llama-3-8B", **_FULL, strategy=strategy), 8)
    assert choice.planned is None
    assert choice.layout == (Layout(dp_replicate=8) if strategy == "ddp" else Layout(dp_shard=8))


def test_auto_on_cpus_takes_replicas_in_silence(log: pytest.LogCaptureFixture) -> None:
    choice = choose(_run("Llama-3-8B", **_FULL, use_cpu=True), 8)
    assert (choice.layout, choice.planned, log.messages) == (Layout(dp_replicate=8), None, [])


@pytest.mark.parametrize(("fits", "expected"), [(True, Layout(dp_replicate=8)), (False, Layout(dp_shard=8))])
def test_auto_when_the_model_is_not_known_falls_back_and_says_why(
    fits: bool,
    expected: Layout,
    gpus: Install,
    log: pytest.LogCaptureFixture,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpus(build_cluster("h100", 8))
    monkeypatch.setattr(machines, "_replica_fits", lambda run: fits)
    # an encoder and a decoder: a model that Transformers has, but no causal one
    config = '{"model_type": "t5", "num_layers": 2, "num_heads": 4, "d_model": 32}'
    (tmp_path / "config.json").write_text(config, encoding="utf-8")
    choice = choose(_run("SmolLM2-135M", **{**_FULL, "model_name_or_path": str(tmp_path)}), 8)
    assert (choice.layout, choice.planned) == (expected, None)
    [line] = log.messages
    assert line.startswith(f"strategy: auto cannot plan (the shape of {tmp_path} cannot be read (")
    assert line.endswith("replicas if one GPU holds the training state, else shards.")


def test_auto_when_nothing_fits_shards_and_warns(
    gpus: Install, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(build_cluster("rtx4090", 2))
    monkeypatch.setattr(machines, "_replica_fits", lambda run: False)
    choice = choose(_run("Llama-3-70B", **_FULL), 2)
    assert (choice.layout, choice.planned) == (Layout(dp_shard=2), None)
    [line] = log.messages
    assert "nothing that is predicted to fit: the leanest layout needs" in line
