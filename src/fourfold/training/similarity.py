"""How alike a generated answer and the given one are: BLEU-4 and ROUGE, as LLaMA-Factory's users know them.

Both depend on how a text is cut up. BLEU counts characters. ROUGE counts words as jieba finds them, which knows where
Chinese words begin; white space is not a word, but a line of nothing else counts as one, as in the package
rouge-chinese. The tests compare with nltk's `sentence_bleu` (smoothing method 3) and with rouge-chinese.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence

from fourfold.base.log import get_logger

log = get_logger(__name__)

Segmenter = Callable[[str], list[str]]
"""Cuts a text into words, with the white space between them."""

FIGURES = ("bleu-4", "rouge-1", "rouge-2", "rouge-l")

_SENTENCE_END, _SIX_DOTS = re.compile(r"(?<=[。！？?])(?= )"), re.compile(r"\.{6}(?P<next>[^”’])")
_MOST_CHARACTERS = 4
"""Longest run of characters that BLEU-4 compares."""


def segmenter() -> Segmenter | None:
    """What cuts a text into words; None, with a warning that says what to install, where there is no jieba."""
    if importlib.util.find_spec("jieba") is None:
        log.warning(
            "predict_with_generate: answers are written without BLEU and ROUGE, which need the package jieba. Install "
            "it with `pip install jieba`."
        )
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own old idioms
        import jieba  # pyright: ignore[reportMissingTypeStubs]

    jieba.setLogLevel(logging.WARNING)
    jieba.initialize()  # now, so that the first answer does not wait for its dictionary
    return jieba.lcut


def similarity(answer: str, label: str, words_of: Segmenter) -> dict[str, float]:
    """The figures of one answer, each from 0 to 100 and rounded to four decimals; see FIGURES.

    Args:
        words_of: see Segmenter.
    """
    ours, theirs = words_of(answer), words_of(label)
    found = {"bleu-4": bleu(answer, label)}
    if any(word.strip() for word in ours) and any(word.strip() for word in theirs):
        first, second = _rouge_words(ours), _rouge_words(theirs)
        found |= {"rouge-1": _rouge_n(first, second, 1), "rouge-2": _rouge_n(first, second, 2)}
        found["rouge-l"] = _f1(common_length(first, second), len(first), len(second))
    return {name: round(100 * found.get(name, 0.0), 4) for name in FIGURES}


def bleu(answer: str, label: str) -> float:
    """BLEU-4 over characters, 0 to 1: the geometric mean of four precisions, times a penalty for brevity.

    A precision of nothing found is smoothed to 1 / (2^k total), k counting such precisions (Chen and Cherry 2014,
    method 3); without a single character in common the result is 0.
    """
    logs, none_found = 0.0, 0
    for size in range(1, _MOST_CHARACTERS + 1):
        ours, theirs = Counter(_runs(answer, size)), Counter(_runs(label, size))
        hits, total = (ours & theirs).total(), max(ours.total(), 1)
        if not hits:
            if size == 1:
                return 0.0
            none_found += 1
        logs += math.log(hits / total if hits else 1 / (2**none_found * total))
    brevity = min(0.0, 1 - len(label) / len(answer))
    return math.exp(logs / _MOST_CHARACTERS + brevity)


def common_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for item in first:
        before = 0  # of the row above, one to the left
        for column, other in enumerate(second, start=1):
            above = row[column]
            row[column] = before + 1 if item == other else max(above, row[column - 1])
            before = above
    return row[-1]


def _rouge_words(cut: Sequence[str]) -> list[str]:
    """The words that count, line by line and sentence by sentence; one of nothing but white space counts as ''."""
    text = _SIX_DOTS.sub(r"......\n\g<next>", _SENTENCE_END.sub("\n", " ".join(cut)))
    return [word for sentence in text.rstrip().split("\n") if sentence for word in sentence.split() or [""]]


def _rouge_n(first: Sequence[str], second: Sequence[str], size: int) -> float:
    ours, theirs = set(_runs(first, size)), set(_runs(second, size))
    return _f1(len(ours & theirs), len(ours), len(theirs))


def _f1(hits: int, ours: int, theirs: int) -> float:
    """The harmonic mean of precision and recall, 0 where there is nothing to compare."""
    precision, recall = hits / max(ours, 1), hits / max(theirs, 1)
    return 2 * precision * recall / (precision + recall + 1e-8)


def _runs(items: Sequence[str], size: int) -> list[tuple[str, ...]]:
    """All runs of `size` neighbours."""
    return [tuple(items[start : start + size]) for start in range(len(items) - size + 1)]
