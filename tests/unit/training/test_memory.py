"""Fitting a step into memory: what was planned first; else cut first, then recompute what is cheap, then everything."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from fourfold.config.load import load
from fourfold.dataset.collate import CutPolicy
from fourfold.parallel.recompute import Recompute
from fourfold.planning.hardware import build_cluster
from fourfold.planning.keeps import Keeps
from fourfold.planning.layout import Layout
from fourfold.planning.predictor import Form
from fourfold.training.memory import choose_fit, fit_to_bytes, fit_to_memory
from fourfold.training.outlook import Outlook
from fourfold.training.step_sizes import StepSizes
from tiny_models import tiny_config, tiny_model

_BYTES: dict[Recompute, int] = {"none": 10, "selective": 5, "full": 1}
_FIXED = 1000


def _room(none: int, selective: int) -> dict[Recompute, int]:
    return {"none": none, "selective": selective, "full": 10 * selective}


def _need(kind: Recompute, tokens: int) -> int:
    """Of a made-up model: so many bytes a token, and some whatever the tokens."""
    return _FIXED + _BYTES[kind] * tokens


@pytest.mark.parametrize(
    ("room", "asked", "expected", "tokens"),
    [
        (_room(8000, 16000), None, "none", 8000),
        (_room(3000, 6000), None, "none", 3000),  # cut, since 2,048 tokens are enough for speed
        (_room(1500, 2500), None, "selective", 2500),
        (_room(500, 1000), None, "full", 8000),
        (_room(8000, 16000), "selective", "selective", 8000),
        (_room(500, 1000), "none", "none", 600),  # the longest sample cannot be cut
    ],
)
def test_fit_when_room_shrinks_cuts_then_recomputes_more(
    room: dict[Recompute, int], asked: Recompute | None, expected: Recompute, tokens: int
) -> None:
    policy = CutPolicy(packed=True, max_tokens=8000)
    fit = choose_fit(policy, StepSizes(longest=600, step=9000), room=room.__getitem__, recompute=asked)
    assert (fit.recompute, fit.policy.max_tokens) == (expected, tokens)


@pytest.mark.parametrize(
    ("free", "expected", "tokens"),
    [
        (100_000, "none", 4000),
        (31_000, "none", 2783),  # 0.93 x 31,000 less what is fixed, at 10 bytes a token
        (21_000, "selective", 3706),  # 1,853 tokens with everything kept would be too few for speed
        (10_000, "full", 4000),
    ],
)
def test_fit_when_bytes_are_free_leaves_a_margin(free: int, expected: Recompute, tokens: int) -> None:
    policy = CutPolicy(packed=True, max_tokens=4000)
    fit = fit_to_bytes(policy, StepSizes(longest=600, step=9000), None, free=free, need=_need)
    assert (fit.recompute, fit.policy.max_tokens) == (expected, tokens)


@pytest.mark.parametrize(
    ("free", "step", "expected", "tokens"),
    [
        (21_000, 9000, "selective", 4000),  # all that is free, since the plan has its own margin
        (20_999, 9000, "selective", 3705),  # the device has less than was planned: 0.93 of it is used
        (100_000, 9000, "selective", 4000),  # more is free, but the plan stands
        (100_000, 1000, "none", 4000),  # steps are smaller than planned, and kept whole they fit
    ],
)
def test_fit_when_planned_starts_from_the_plan(free: int, step: int, expected: Recompute, tokens: int) -> None:
    planned = Form(Layout(dp_shard=8), "selective", 4000)
    policy = CutPolicy(packed=True, max_tokens=4000)
    fit = fit_to_bytes(policy, StepSizes(longest=600, step=step), None, free=free, need=_need, planned=planned)
    assert (fit.recompute, fit.policy.max_tokens) == (expected, tokens)


@pytest.fixture
def little_free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> int:
    """Bytes that are free on a GPU."""
    monkeypatch.setenv("FOURFOLD_CACHE", str(tmp_path))
    free = 180 << 20
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free - 1000, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2000)
    return free


@pytest.mark.parametrize(("schedule", "kept"), [("1f1b", False), ("zbv", True)])
@pytest.mark.usefixtures("little_free")
def test_fit_when_zero_bubble_splits_the_backward_pass_recomputes_nothing(
    schedule: str, kept: bool, tmp_path: Path
) -> None:
    tiny_config("llama", num_hidden_layers=8).save_pretrained(tmp_path / "llama")
    keys = {"model_name_or_path": str(tmp_path / "llama"), "dataset": "d", "output_dir": "o", "bf16": True}
    run = load({**keys, "finetuning_type": "full"}, verb="train")
    sizes, module = StepSizes(longest=4000, step=4000, smallest=4000, mean=4000.0), tiny_model("llama")
    layout = Layout(pp=2, pp_schedule=schedule)  # type: ignore[arg-type]
    outlook = Outlook.of(run, module, layout, build_cluster("h100", gpus=2), sizes, packed=True, document=64.0)
    policy, device = CutPolicy(packed=True, max_tokens=4000), torch.device("cuda")
    fit = fit_to_memory(policy, module, sizes, None, device=device, outlook=outlook)
    assert (fit.recompute == "none") == kept


@pytest.mark.parametrize(("asked", "spares"), [(None, True), (None, False), ("full", True)])
@pytest.mark.usefixtures("little_free")
def test_fit_when_a_part_of_the_layers_has_room_spares_them(
    asked: Recompute | None,
    spares: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    free = 300 << 20
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free - 1000, 80 << 30))
    monkeypatch.setattr(logging.getLogger("fourfold"), "propagate", True)
    caplog.set_level(logging.INFO, "fourfold")
    tiny_config("llama", num_hidden_layers=12).save_pretrained(tmp_path / "llama")
    keys = {"model_name_or_path": str(tmp_path / "llama"), "dataset": "d", "output_dir": "o", "bf16": True}
    run, module = load(keys, verb="train"), tiny_model("llama")
    sizes = StepSizes(longest=20_000, step=20_000, smallest=20_000, mean=20_000.0)
    outlook = Outlook.of(run, module, Layout(), build_cluster("h100"), sizes, packed=True, document=64.0)
    policy, device = CutPolicy(packed=True, max_tokens=20_000), torch.device("cuda")
    fit = fit_to_memory(policy, module, sizes, asked, device=device, outlook=outlook, spares=spares)
    assert fit.recompute != "none"
    if asked is None and spares:
        assert 0 < fit.keeps.spared < 12
        now, more = (outlook.keeping(Keeps(spared=count)) for count in (fit.keeps.spared, fit.keeps.spared + 1))
        assert now.to_come(fit.recompute, 20_000) <= 0.93 * free
        assert more.to_come(fit.recompute, 20_000) > 0.93 * free
        assert f"in the backward pass, but for {fit.keeps.spared} of 12 layers;" in caplog.text
    else:
        assert fit.keeps.spared == 0
        assert "but for" not in caplog.text


def test_fit_when_the_device_has_little_free_cuts_and_tells(
    little_free: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("fourfold"), "propagate", True)
    caplog.set_level(logging.INFO, "fourfold")
    tiny_config("llama").save_pretrained(tmp_path / "llama")
    keys = {"model_name_or_path": str(tmp_path / "llama"), "dataset": "d", "output_dir": "o", "bf16": True}
    run = load({**keys, "finetuning_type": "full"}, verb="train")
    sizes, module = StepSizes(longest=64, step=4000, smallest=4000, mean=4000.0), tiny_model("llama")
    outlook = Outlook.of(run, module, Layout(), build_cluster("h100"), sizes, packed=True, document=64.0)
    policy, device = CutPolicy(packed=True, max_tokens=4000), torch.device("cuda")
    fit = fit_to_memory(policy, module, sizes, "none", device=device, outlook=outlook)
    tokens = fit.policy.max_tokens
    assert 64 < tokens < 4000
    assert outlook.to_come("none", tokens) <= 0.93 * little_free < outlook.to_come("none", tokens + 1)
    [line] = set(caplog.messages)  # twice where a run before has set logging up
    assert line.startswith(f"Activations are kept; micro-batches of up to {tokens:,} tokens; 180.00 MiB are free")
