"""What GPUs this machine has, asked of the driver's own tools, so that nothing heavy is imported."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fourfold.base.errors import PlanError
from fourfold.base.units import GIB, MIB
from fourfold.planning.catalogue import DEVICES
from fourfold.planning.device import Device
from fourfold.planning.hardware import Cluster, build_cluster, find_device, nearest_device

_TIMEOUT_S = 5
_USABLE = 0.985  # of the driver's total where it does not tell what it keeps; 0.97 to 0.994 on known cards
_SAME_CARD = 0.05  # the driver's total exceeds what a process may use by less than this share


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU as its driver names it.

    Attributes:
        name: e.g. `NVIDIA H100 80GB HBM3`.
        total_bytes: all memory; None if the driver does not tell.
        reserved_bytes: of which the driver and the firmware keep so much; None if it does not tell.
    """

    name: str
    total_bytes: int | None
    reserved_bytes: int | None = None


def detect() -> Cluster | None:
    """This machine as a cluster of one node; None if it has no GPU or no driver.

    `CUDA_VISIBLE_DEVICES` is respected.
    """
    cards = _visible(_nvidia_cards() or _amd_cards())
    return cluster_of_cards(cards) if cards else None


def cluster_of_cards(cards: Sequence[Card]) -> Cluster:
    """One node of these GPUs, at least one.

    Cards of different kinds count as the one with the least memory, and a card that the catalogue lacks has the
    driver's memory and the speed of the nearest name; the notes say so.
    """
    devices = [_device(card) for card in cards]
    least = min(devices, key=lambda device: device.memory_gib)
    kinds = sorted({card.name for card in cards})
    notes = (f"GPUs differ ({', '.join(kinds)}): all are taken as {least.title}.",) if len(kinds) > 1 else ()
    return build_cluster(least, gpus=len(cards), notes=notes)


def _nvidia_cards() -> list[Card]:
    """What nvidia-smi lists; older drivers do not know how much they reserve."""
    for fields in ("name,memory.total,memory.reserved", "name,memory.total"):
        output = _run("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader")
        if output is not None:
            return [_nvidia_card(line) for line in output.splitlines() if "," in line]
    return []


def _nvidia_card(line: str) -> Card:
    name, *sizes = (part.strip() for part in line.split(","))
    total, reserved = ([_mebibytes(size) for size in sizes] + [None])[:2]
    return Card(name, total, reserved)


def _mebibytes(text: str) -> int | None:
    """Bytes of `81559 MiB`; None for `[N/A]`."""
    number = text.split()[0] if text else ""
    return int(number) * MIB if number.isdigit() else None


def _amd_cards() -> list[Card]:
    output = _run("rocm-smi", "--showproductname", "--showmeminfo", "vram", "--json")
    try:
        found = json.loads(output) if output else {}
    except json.JSONDecodeError:
        return []
    rows = [{key.lower(): value for key, value in row.items()} for row in found.values() if isinstance(row, dict)]
    return [
        Card(row["card series"], int(row["vram total memory (b)"]), 0)
        for row in rows
        if "card series" in row and str(row.get("vram total memory (b)", "")).isdigit()
    ]


def _run(*command: str) -> str | None:
    """What a program prints; None if it is absent, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _visible(cards: list[Card]) -> list[Card]:
    """The cards that CUDA_VISIBLE_DEVICES leaves; as CUDA does, it ends at the first entry that is not valid."""
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return cards
    kept: list[Card] = []
    for entry in wanted.replace(" ", "").split(","):
        if entry.isdigit() and int(entry) < len(cards):
            kept.append(cards[int(entry)])
        elif entry.startswith(("GPU-", "MIG-")) and len(kept) < len(cards):
            kept.append(cards[len(kept)])
        else:
            break
    return kept


def _device(card: Card) -> Device:
    """The catalogue's device with the memory that the driver tells."""
    try:
        known = find_device(card.name)
    except PlanError:
        return _unlisted(card)
    usable = _usable_gib(card)
    known = replace(known, note="")  # the driver tells which of two cards it is, by its memory
    if usable is None:
        return known
    if abs(usable / known.memory_gib - 1) < _SAME_CARD:
        return replace(known, memory_gib=usable) if card.reserved_bytes is not None else known
    sister = next((device for device in _sisters(known) if abs(usable / device.memory_gib - 1) < _SAME_CARD), None)
    if sister is not None:
        return replace(sister, memory_gib=usable)
    return replace(known, memory_gib=usable).with_note(
        f"{card.name}: has {usable:.1f} GiB instead of {known.memory_gib:.1f}; the driver's figure is used."
    )


def _sisters(device: Device) -> list[Device]:
    """Cards of the same name but for memory, e.g. a100-40 and a100-80."""
    base, form = device.name.split("-")[0], device.name.endswith("-pcie")
    return [other for key, other in DEVICES.items() if key.split("-")[0] == base and key.endswith("-pcie") == form]


def _usable_gib(card: Card) -> float | None:
    if card.total_bytes is None:
        return None
    if card.reserved_bytes is not None:
        return (card.total_bytes - card.reserved_bytes) / GIB
    return card.total_bytes * _USABLE / GIB


def _unlisted(card: Card) -> Device:
    """A device for a card that the catalogue lacks: the figures of the nearest name, at worst a T4's, over PCIe."""
    like = nearest_device(card.name) or DEVICES["t4"]
    memory = _usable_gib(card)
    slow = DEVICES["l4"]
    return replace(
        like,
        name="unlisted",
        title=card.name,
        memory_gib=like.memory_gib if memory is None else memory,
        link=slow.link,
        link_domain=slow.link_domain,
        link_leaves_node=False,
        nic_gbit_per_s=slow.nic_gbit_per_s,
        source=f"memory: the driver; speed: {like.title}",
        note=(
            f"{card.name}: not in the catalogue; memory is the driver's, speed is taken from {like.title} and the link "
            "is PCIe. Give its figures with --hardware FILE.yaml."
        ),
    )
