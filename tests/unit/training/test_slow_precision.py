"""What is told of bf16 on a CPU that has no instructions for it."""

from __future__ import annotations

import logging

import pytest
import torch

from fourfold.config.load import load
from fourfold.training import precision

_KEYS = {"model_name_or_path": "m", "dataset": "d", "output_dir": "o"}


@pytest.mark.parametrize(
    ("keys", "has", "told"),
    [
        ({"bf16": True}, False, "Use bf16: false."),
        ({"pure_bf16": True}, False, "Use pure_bf16: false."),
        ({"bf16": True}, True, ""),
        ({}, False, ""),
    ],
)
def test_warn_of_slow_when_a_cpu_has_no_bf16_names_the_key(
    keys: dict[str, bool], has: bool, told: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(precision.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    run = load({**_KEYS, **keys}, verb="train")
    with caplog.at_level(logging.WARNING):
        precision.warn_of_slow(run, precision.resolve(run), torch.device("cpu"))
        precision.warn_of_slow(run, precision.resolve(run), torch.device("meta"))
    assert [record.getMessage()[-len(told) :] for record in caplog.records] == ([told] if told else [])


def test_multiplies_bf16_when_not_on_x86_is_taken_for_granted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision.platform, "machine", lambda: "aarch64")
    assert precision.multiplies_bf16()
