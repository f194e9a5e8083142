"""Verifiable rewards that `reward_funcs` knows by plain name.

Each public function here is one; it is written as a user would write one, and reads nothing but its arguments.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

_BOXED = "\\boxed{"
_THINK, _THOUGHT = "<think>", "</think>"
_ABBREVIATIONS = frozenset(
    (
        "mr",
        "mrs",
        "ms",
        "dr",
        "prof",
        "st",
        "vs",
        "e.g",
        "i.e",
        "etc",
        "cf",
        "fig",
        "approx",
        "a.m",
        "p.m",
        "u.s",
        "u.k",
    )
)
_SENTENCE_END = re.compile(r"(?<![.!?…])[.!?…]+[\"'”’)\]]*(?=\s|$)|[。！？]+[”’」』）]*")
_NUMBER = re.compile(r"[+-]?(\d{1,3}(,\d{3})+|\d+)?(\.\d+)?")


def exact_match(completions: Sequence[str], references: Sequence[str | None]) -> list[float | None]:
    r"""1 where the final answer is the reference's, else 0; nothing where the row has no reference.

    The final answer of either text, after a `</think>`, is what its last `\boxed{}` holds, else what follows the last
    `####` on its line, else the last line. Spaces, dollar signs around it and a stop after it do not count; numbers are
    compared as numbers (`1,200` and `1200.0` are the same).
    """
    return [
        None if reference is None else float(_same(_final_answer(completion), _final_answer(reference)))
        for completion, reference in zip(completions, references, strict=True)
    ]


def one_sentence(completions: Sequence[str]) -> list[float]:
    """1 where the completion is exactly one sentence, else 0.

    That is one line with a letter in it, that ends with a full stop, an exclamation or question mark (quotes and
    brackets may follow) and has no other one before a space. Stops within numbers, of common abbreviations and of
    initials end no sentence.
    """
    return [float(_is_one_sentence(completion.strip())) for completion in completions]


def format_think(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """1 where the completion is `<think>`, some thought, `</think>` and some answer, else 0.

    Each mark must be there once. Where the prompt ends with `<think>`, as some templates have it, the completion begins
    with the thought.
    """
    return [
        float(_thinks(_THINK + completion if prompt.rstrip().endswith(_THINK) else completion))
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def _final_answer(text: str) -> str:
    text = text.rpartition(_THOUGHT)[2].strip()
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed
    _, mark, after = text.rpartition("####")
    if mark:
        return (after.strip().splitlines() or [""])[0]
    return (text.splitlines() or [""])[-1]


def _last_boxed(text: str) -> str | None:
    """What is in the last complete `\\boxed{}`, whose braces may be nested."""
    end = len(text)
    while (start := text.rfind(_BOXED, 0, end)) >= 0:
        depth = 1
        for position in range(start + len(_BOXED), len(text)):
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                return text[start + len(_BOXED) : position]
        end = start
    return None


def _same(answer: str, expected: str) -> bool:
    answer, expected = _normalised(answer), _normalised(expected)
    if answer == expected:
        return answer != ""
    left, right = _number(answer), _number(expected)
    return left is not None and left == right


def _normalised(answer: str) -> str:
    return " ".join(answer.split()).strip("$ ").removesuffix(".").strip("$ ")


def _number(answer: str) -> Decimal | None:
    if not _NUMBER.fullmatch(answer):
        return None
    try:
        return Decimal(answer.replace(",", ""))
    except InvalidOperation:  # a sign or nothing at all
        return None


def _is_one_sentence(text: str) -> bool:
    if len(text.splitlines()) != 1 or not any(letter.isalpha() for letter in text):
        return False
    ends = [found.end() for found in _SENTENCE_END.finditer(text) if not _within(text, found)]
    return ends == [len(text)]


def _within(text: str, end: re.Match[str]) -> bool:
    """Whether a stop before the end of the text belongs to an abbreviation or an initial."""
    if end.group() != "." or end.end() == len(text):
        return False
    word = text[: end.start()].split(" ")[-1].lstrip("(\"'“‘")
    return word.lower() in _ABBREVIATIONS or (len(word) == 1 and word.isupper() and word != "I")


def _thinks(text: str) -> bool:
    text = text.strip()
    if text.count(_THINK) != 1 or text.count(_THOUGHT) != 1 or not text.startswith(_THINK):
        return False
    thought, _, answer = text.removeprefix(_THINK).partition(_THOUGHT)
    return bool(thought.strip() and answer.strip())
