"""Peak host memory of each rank while a model is loaded and trained: its share, not the whole model."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from harness import run_ranks

from fourfold.config.load import load
from fourfold.config.schema import Run
from fourfold.models.adapters import attach
from fourfold.models.load import load_model, load_streamed
from fourfold.models.targets import decoder_blocks
from fourfold.models.tokenizer import load_tokenizer
from fourfold.models.unwrap import base_model
from fourfold.parallel.apply import parallelize
from fourfold.parallel.mesh import build_mesh
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


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of 460 MiB in fp32."""
    return save_tiny_model(tmp_path_factory.mktemp("model"), "llama", **_SIZES)


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10


def _peaks(run: Run, layout: Layout, *, streamed: bool, train: bool) -> tuple[int, int]:
    """Bytes by which this rank's peak grew until the model was loaded, and until a step was done."""
    torch.set_num_threads(1)
    mesh, tokenizer = build_mesh(layout, _CPU), load_tokenizer(run.model)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
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
    loaded = _status("VmHWM") - before
    if train:
        optimizer = torch.optim.AdamW([p for p in inner.parameters() if p.requires_grad], lr=1e-3, foreach=False)
        split.runner(input_ids=torch.arange(3, 19)[None]).logits.float().mean().backward()
        optimizer.step()
    return loaded, _status("VmHWM") - before


def _run(model: Path) -> Run:
    return load({"model_name_or_path": str(model), "finetuning_type": "full"})


@pytest.mark.parametrize("ranks", [2, 4])
def test_loading_when_sharded_takes_a_share_of_each_rank(ranks: int, model: Path) -> None:
    run, share = _run(model), _TOTAL // ranks
    peaks = run_ranks(ranks, lambda: _peaks(run, Layout(dp_shard=ranks), streamed=True, train=ranks == 2))
    print(
        f"{ranks} ranks, whole {_TOTAL / _MIB:.0f} MiB: "
        + ", ".join(f"{a / _MIB:.0f} {b / _MIB:.0f}" for a, b in peaks)
    )
    for loaded, trained in peaks:
        assert share * 0.9 < loaded < share + _SLACK
        # weights, gradients and two moments; what is gathered, its gradient, and a buffer of the exchange for each
        assert trained < 4 * share + 4 * _LARGEST_UNIT + _SLACK


def test_loading_when_matrices_are_shared_takes_a_share_of_each_rank(model: Path) -> None:
    run = _run(model)
    peaks = run_ranks(2, lambda: _peaks(run, Layout(tp=2), streamed=True, train=False))
    for loaded, _ in peaks:
        assert loaded < _TOTAL // 2 + _SLACK


def test_loading_when_whole_takes_more_than_that(model: Path) -> None:
    """The control: the tests above would notice a rank that has the whole model."""
    run = _run(model)
    peaks = run_ranks(2, lambda: _peaks(run, Layout(dp_shard=2), streamed=False, train=False))
    for loaded, _ in peaks:
        assert loaded > _TOTAL
