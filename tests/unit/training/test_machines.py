"""Processes of a run, as keys, the environment and other tools' files ask for them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from fourfold.base.errors import ConfigError, PlanError
from fourfold.config.load import load
from fourfold.config.schema import Run
from fourfold.training.machines import choose_layout, machines_of, settle_offload
from tiny_models import save_tiny_model

_VARIABLES = ("NNODES", "NODE_RANK", "NPROC_PER_NODE", "MASTER_ADDR", "MASTER_PORT")
_ZERO3 = {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}}


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in _VARIABLES:
        monkeypatch.delenv(name, raising=False)


def make_run(**keys: Any) -> Run:
    return load({"model_name_or_path": "m", "output_dir": "o", "dataset": "d", "use_cpu": True, **keys}, verb="train")


def test_machines_of_when_variables_are_given_or_empty_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in _VARIABLES:
        monkeypatch.setenv(name, "")
    found = machines_of(make_run())
    assert (found.per_node, found.num_nodes, found.node_rank, found.address) == (1, 1, 0, "127.0.0.1")
    for name, value in zip(_VARIABLES, ("2", "1", "4", "host", "29500"), strict=True):
        monkeypatch.setenv(name, value)
    found = machines_of(make_run())
    assert (found.per_node, found.num_nodes, found.node_rank, found.address) == (4, 2, 1, "host")
    assert found.port == 29500


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "NNODES",
            "2:3",
            "NNODES: '2:3' is not a whole number of at least 1. Give one, or unset it. A range is torchrun's",
        ),
        ("NNODES", "0", "NNODES: '0' is not a whole number of at least 1."),
        ("NPROC_PER_NODE", "gpu", "NPROC_PER_NODE: 'gpu' is not a whole number of at least 0."),
        ("NODE_RANK", "-1", "NODE_RANK: '-1' is not a whole number"),
        ("MASTER_PORT", "29500.", "MASTER_PORT: '29500.' is not a whole number"),
    ],
)
def test_machines_of_when_a_variable_is_no_number_says_so(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="^" + re.escape(message)):
        machines_of(make_run())


def test_settle_offload_when_one_process_has_a_deepspeed_file_offloads_the_optimizer(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    run = make_run(deepspeed=_ZERO3)
    assert run.parallel.offload == "params"
    settled = settle_offload(run, 1)
    assert settled.parallel.offload == "optimizer"
    assert caplog.text.count("with one process it is taken for optimizer") == 1
    assert choose_layout(settled, 1).world_size == 1
    assert settle_offload(make_run(deepspeed=_ZERO3, optim="adafactor"), 1).parallel.offload == "none"
    assert settle_offload(run, 2) is run


def test_settle_offload_when_the_user_says_params_leaves_it_to_be_refused() -> None:
    for keys in ({}, {"deepspeed": _ZERO3}):
        run = settle_offload(make_run(parallel={"offload": "params"}, **keys), 1)
        with pytest.raises(
            PlanError, match="Use strategy: fsdp with several processes, or parallel.offload: optimizer"
        ):
            choose_layout(run, 1)


def test_layout_when_a_file_offloads_params_without_shards_gives_advice_that_fits_the_file(tmp_path: Path) -> None:
    model = str(save_tiny_model(tmp_path / "model", "qwen3"))
    run = make_run(model_name_or_path=model, deepspeed=_ZERO3, parallel={"tp": 2})
    with pytest.raises(PlanError, match=r"params works on shards only.* or a DeepSpeed file without offload_param"):
        choose_layout(run, 2)
