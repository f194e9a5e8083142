"""What the driver's tools say, played by small scripts on PATH."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fourfold.planning.detect import detect

Install = Callable[[str, str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts a tool of a name on an otherwise empty PATH; its body is a shell script."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def put(name: str, body: str) -> None:
        tool = tmp_path / name
        tool.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
        tool.chmod(0o755)

    return put


def _prints(*lines: str) -> str:
    return "\n".join(f'echo "{line}"' for line in lines)


def test_detect_when_there_is_no_driver_is_none(install: Install) -> None:
    assert detect() is None
    install("nvidia-smi", 'echo "NVIDIA-SMI has failed" >&2; exit 9')
    assert detect() is None


def test_detect_when_the_driver_tells_what_it_keeps_subtracts_it(install: Install) -> None:
    install("nvidia-smi", _prints(*["NVIDIA H100 80GB HBM3, 81559 MiB, 551 MiB"] * 4))
    cluster = detect()
    assert cluster is not None
    assert (cluster.device.name, cluster.per_node, cluster.nodes) == ("h100", 4, 1)
    assert cluster.device.memory_gib == pytest.approx((81559 - 551) / 1024)
    assert cluster.notes == ()


def test_detect_when_the_driver_is_old_takes_the_catalogues_memory(install: Install) -> None:
    old = 'case "$*" in *reserved*) exit 2;; esac\n'
    install("nvidia-smi", old + _prints("NVIDIA H200, 143771 MiB"))
    cluster = detect()
    assert cluster is not None
    assert (cluster.device.name, cluster.device.memory_gib, cluster.notes) == ("h200", 139.80, ())


def test_detect_when_the_name_leaves_memory_open_goes_by_the_driver(install: Install) -> None:
    install("nvidia-smi", _prints("NVIDIA A100, 40960 MiB, 625 MiB"))
    cluster = detect()
    assert cluster is not None
    assert (cluster.device.name, cluster.notes) == ("a100-40", ())


def test_detect_when_memory_is_unlike_the_catalogues_says_so(install: Install) -> None:
    install("nvidia-smi", _prints("NVIDIA GeForce RTX 4090, 49140 MiB, 400 MiB"))
    cluster = detect()
    assert cluster is not None
    assert cluster.device.name == "rtx4090"
    assert cluster.device.memory_gib == pytest.approx(47.6, abs=0.1)
    assert "47.6 GiB instead of 23.5" in cluster.notes[0]


def test_detect_when_the_card_is_unlisted_takes_memory_from_the_driver(install: Install) -> None:
    install("nvidia-smi", _prints("NVIDIA H100 NVL, 95830 MiB, 600 MiB"))
    cluster = detect()
    assert cluster is not None
    device = cluster.device
    assert (device.name, device.title, device.link.kind) == ("unlisted", "NVIDIA H100 NVL", "pcie")
    assert device.memory_gib == pytest.approx(93.0, abs=0.1)
    assert device.peak("bf16") == 756e12
    assert "not in the catalogue" in cluster.notes[0]


def test_detect_when_nothing_is_like_the_card_is_slow(install: Install) -> None:
    install("nvidia-smi", _prints("Zyx 9, [N/A], [N/A]"))
    cluster = detect()
    assert cluster is not None
    assert cluster.device.peak("fp16") == 65e12


def test_detect_when_cards_differ_takes_the_least(install: Install) -> None:
    install("nvidia-smi", _prints("NVIDIA H200, 143771 MiB, 600 MiB", "NVIDIA L4, 23034 MiB, 470 MiB"))
    cluster = detect()
    assert cluster is not None
    assert (cluster.device.name, cluster.per_node) == ("l4", 2)
    assert "GPUs differ (NVIDIA H200, NVIDIA L4)" in cluster.notes[0]


@pytest.mark.parametrize(
    ("visible", "names"), [("1", ["l4"]), ("1,0", ["l4", "l4"]), ("0,7", ["h200"]), ("GPU-8f", ["h200"])]
)
def test_detect_when_some_are_visible_counts_those(
    install: Install, monkeypatch: pytest.MonkeyPatch, visible: str, names: list[str]
) -> None:
    install("nvidia-smi", _prints("NVIDIA H200, 143771 MiB, 600 MiB", "NVIDIA L4, 23034 MiB, 470 MiB"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    cluster = detect()
    assert cluster is not None
    assert [cluster.device.name] * cluster.per_node == names


@pytest.mark.parametrize("visible", ["", "-1"])
def test_detect_when_none_is_visible_is_none(install: Install, monkeypatch: pytest.MonkeyPatch, visible: str) -> None:
    install("nvidia-smi", _prints("NVIDIA H200, 143771 MiB, 600 MiB"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert detect() is None


def test_detect_when_there_are_amd_cards_asks_rocm(install: Install) -> None:
    card = {"Card Series": "AMD Instinct MI300X", "VRAM Total Memory (B)": str(206_141_652_992)}
    install("rocm-smi", f"echo '{json.dumps({'card0': card, 'card1': card})}'")
    cluster = detect()
    assert cluster is not None
    assert (cluster.device.name, cluster.per_node) == ("mi300x", 2)
    install("rocm-smi", "echo 'no json'")
    assert detect() is None
