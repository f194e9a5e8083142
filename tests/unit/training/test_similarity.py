"""BLEU and ROUGE equal those of the packages that LLaMA-Factory computes them with (golden/similarity.json)."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import jieba
import pytest

from fourfold.training import similarity as module
from fourfold.training.similarity import common_length, segmenter, similarity

ROWS: list[dict[str, Any]] = json.loads(
    (Path(__file__).parents[2] / "golden" / "similarity.json").read_text(encoding="utf-8")
)["rows"]


@pytest.mark.parametrize("row", ROWS)
def test_similarity_when_given_reference_pairs_equals_the_packages(row: dict[str, Any]) -> None:
    words = dict(zip((row["answer"], row["label"]), row["words"], strict=True))
    assert similarity(row["answer"], row["label"], words.__getitem__) == pytest.approx(row["figures"], abs=1e-4)


def test_segmenter_when_jieba_is_there_cuts_as_it_does() -> None:
    words_of = segmenter()
    assert words_of is not None
    assert [words_of(row["answer"]) for row in ROWS] == [row["words"][0] for row in ROWS]
    assert words_of is jieba.lcut


def test_segmenter_when_jieba_is_missing_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(logging.getLogger("fourfold"), "propagate", True)
    assert segmenter() is None
    assert caplog.messages[-1].endswith("Install it with `pip install jieba`.")


def test_common_length_when_items_are_apart_skips_them() -> None:
    assert common_length("abcbdab", "bdcaba") == 4  # bcba, the textbook's example
    assert common_length("", "abc") == 0
