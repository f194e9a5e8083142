"""Peak host memory of each rank while a model is loaded and trained: its share, not the whole model."""

from __future__ import annotations

import multiprocessing
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks

from fourfold.config.load import load
from fourfold.models.adapters import attach
from fourfold.models.load import load_model, load_streamed
from fourfold.models.targets import decoder_blocks
from fourfold.models.tokenizer import load_tokenizer
from fourfold.models.unwrap import base_model
from fourfold.parallel.apply import parallelize
from fourfold.parallel.mesh import Mesh, build_mesh
from fourfold.planning.layout import Layout
from tiny_models import save_tiny_model

_CPU = torch.device("cpu")
_MIB = 1 << 20
_SLACK = 80 * _MIB
"""What is read of a file at once (16 MiB), buffers of the exchange, and what Python takes."""
_SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 8192,
}
_TOTAL = 4 * (8 * (4 * 1024 * 1024 + 3 * 1024 * 2816 + 2 * 1024) + 2 * 8192 * 1024 + 1024)
_LARGEST_UNIT = 4 * 2 * 8192 * 1024
"""Embedding and head, which are gathered together."""


_FRESH = multiprocessing.get_context("forkserver")
"""Not a fork of this process: what earlier tests left in it would count, page by page, as it is touched."""
_FRESH.set_forkserver_preload(["harness", "fourfold.models.load", "fourfold.parallel.apply"])


@dataclass(frozen=True)
class Models:
    """Two llamas: one of 456 MiB in fp32, and a tiny one with which code and libraries are brought into memory."""

    large: Path
    tiny: Path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("models")
    return Models(
        save_tiny_model(folder / "large", "llama", **_SIZES), save_tiny_model(folder / "tiny", "llama", head_dim=8)
    )


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10


def _load_and_train(folder: Path, mesh: Mesh, *, streamed: bool, train: bool) -> int:
    """Load a model and train it for a step; returns the peak of this process's memory after loading."""
    run = load({"model_name_or_path": str(folder), "finetuning_type": "full"})
    tokenizer = load_tokenizer(run.model)
    fill = {}
    if streamed:
        found = load_streamed(run.model, run.tuning, dtype=torch.float32, tokenizer=tokenizer)
        assert found is not None
        module = attach(found[0], run.model, run.tuning, trainable=True)
        fill = {"fill": partial(found[1].fill, module, _CPU)}
    else:
        whole = load_model(run.model, dtype=torch.float32, device=_CPU, tokenizer=tokenizer)
        module = attach(whole, run.model, run.tuning, trainable=True)
        del whole
    inner = base_model(module)
    split = parallelize(inner, list(decoder_blocks(inner)[1]), mesh, compute=None, **fill)
    loaded = _status("VmHWM")
    if train:
        optimizer = torch.optim.AdamW([p for p in inner.parameters() if p.requires_grad], lr=1e-3, foreach=False)
        split.runner(input_ids=torch.arange(3, 19)[None]).logits.float().mean().backward()
        optimizer.step()
    return loaded


def _peaks(models: Models, layout: Layout, *, streamed: bool, train: bool) -> tuple[int, int]:
    """Bytes by which this rank's peak grew until the model was loaded, and until a step was done."""
    torch.set_num_threads(1)
    mesh = build_mesh(layout, _CPU)
    _load_and_train(models.tiny, mesh, streamed=streamed, train=train)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    loaded = _load_and_train(models.large, mesh, streamed=streamed, train=train)
    return loaded - before, _status("VmHWM") - before


def _work(ranks: int, models: Models, layout: Layout, streamed: bool, train: bool, writer: Any) -> None:
    try:
        writer.send(run_ranks(ranks, lambda: _peaks(models, layout, streamed=streamed, train=train)))
    except BaseException as error:
        writer.send(repr(error))


def _peaks_of_ranks(
    ranks: int, models: Models, layout: Layout, *, streamed: bool, train: bool = False
) -> list[tuple[int, int]]:
    reader, writer = _FRESH.Pipe(duplex=False)
    process = _FRESH.Process(target=_work, args=(ranks, models, layout, streamed, train, writer))
    process.start()
    found = reader.recv()
    process.join(30)
    assert isinstance(found, list), found
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_loading_when_sharded_takes_a_share_of_each_rank(ranks: int, models: Models) -> None:
    share = _TOTAL // ranks
    peaks = _peaks_of_ranks(ranks, models, Layout(dp_shard=ranks), streamed=True, train=ranks == 2)
    print(
        f"{ranks} ranks, whole {_TOTAL / _MIB:.0f} MiB: "
        + ", ".join(f"{a / _MIB:.0f} {b / _MIB:.0f}" for a, b in peaks)
    )
    for loaded, trained in peaks:
        assert share * 0.9 < loaded < share + _SLACK
        # weights, gradients and two moments; what is gathered, its gradient, and a buffer of the exchange for each
        assert trained < 4 * share + 4 * _LARGEST_UNIT + _SLACK


def test_loading_when_matrices_are_shared_takes_a_share_of_each_rank(models: Models) -> None:
    for loaded, _ in _peaks_of_ranks(2, models, Layout(tp=2), streamed=True):
        assert loaded < _TOTAL // 2 + _SLACK


def test_loading_when_whole_takes_more_than_that(models: Models) -> None:
    """The control: the tests above would notice a rank that has the whole model."""
    for loaded, _ in _peaks_of_ranks(2, models, Layout(dp_shard=2), streamed=False):
        assert loaded > _TOTAL
