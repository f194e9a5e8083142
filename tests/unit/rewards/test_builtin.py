"""The rewards that are known by plain name."""

from __future__ import annotations

import pytest

from fourfold.rewards.builtin import exact_match, format_think, one_sentence


@pytest.mark.parametrize(
    ("completion", "reference", "expected"),
    [
        ("42", "42", 1),
        ("43", "42", 0),
        ("First 2 times 21.\n42.\n", "42", 1),
        ("42\nis the answer", "42", 0),
        (r"so \boxed{41}, no, \boxed{42}", "42", 1),
        (r"\boxed{\frac{1}{2}} it is", r"\frac{1}{2}", 1),
        (r"\boxed{42} and then \boxed{never closed", "42", 1),
        ("6 * 7 = 42\n#### 42\nDone.", "work\n#### 42", 1),
        ("####", "####", 0),
        ("", "", 0),
        ("$1,200$.", "1200.0", 1),
        ("1,20", "120", 0),
        ("<think>\n42\n</think>\n41", "42", 0),
        ("a  b", "a b", 1),
        ("-", "+", 0),
        ("anything", None, None),
    ],
)
def test_exact_match_when_completion_has_an_answer_compares_it(
    completion: str, reference: str | None, expected: float | None
) -> None:
    assert exact_match([completion], [reference]) == [expected]


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("It costs 3.50 euros.", 1),
        (" Yes! ", 1),
        ('He said "No."', 1),
        ("Dr. J. Smith, e.g. him, agrees.", 1),
        ("Really?!", 1),
        ("你好。", 1),
        ("你好。再见。", 0),
        ("One. Two.", 0),
        ("one. two.", 0),
        ("It was I. You saw.", 0),
        ("No end", 0),
        ("One. No end", 0),
        ("Two\nlines.", 0),
        ("...", 0),
        ("", 0),
    ],
)
def test_one_sentence_when_completion_is_or_is_not_one_says_so(completion: str, expected: float) -> None:
    assert one_sentence([completion]) == [expected]


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        ("", "<think>why</think>so", 1),
        ("", "\n<think>\nwhy\n</think>\n\nso\n", 1),
        ("<think>\n", "why</think>so", 1),
        ("", "why</think>so", 0),
        ("<think>\n", "<think>why</think>so", 0),
        ("", "<think> </think>so", 0),
        ("", "<think>why</think> ", 0),
        ("", "<think>why</think>so</think>", 0),
        ("", "so <think>why</think>so", 0),
        ("", "</think>why<think>so", 0),
    ],
)
def test_format_think_when_marks_are_right_or_wrong_says_so(prompt: str, completion: str, expected: float) -> None:
    assert format_think([prompt], [completion]) == [expected]
