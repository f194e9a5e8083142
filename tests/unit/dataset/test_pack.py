"""Packing by length."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from fourfold.dataset.pack import pack_lengths

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "tokenised.json").read_text(encoding="utf-8"))


def test_pack_lengths_when_given_the_reference_lengths_makes_the_reference_packs() -> None:
    case = GOLDEN["packing"]
    packs = pack_lengths(case["lengths"], case["capacity"])
    assert [[case["lengths"][number] for number in pack] for pack in packs] == case["packs"]


def test_pack_lengths_whatever_the_lengths_uses_each_sample_once_and_never_overfills() -> None:
    lengths = np.random.default_rng(0).integers(1, 101, size=300).tolist()
    packs = pack_lengths(lengths, 100)
    assert sorted(number for pack in packs for number in pack) == list(range(300))
    assert all(sum(lengths[number] for number in pack) <= 100 for pack in packs)


def test_pack_lengths_when_there_is_nothing_makes_no_packs() -> None:
    assert pack_lengths([], 10) == []
