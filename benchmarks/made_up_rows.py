"""Rows of the lengths of the two data sets that a first run trains: 91 short ones of identity, 500 of instructions.

The text is random words; only its length matters for speed.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

IDENTITY_ROWS = 91
INSTRUCTION_ROWS = 500

_IDENTITY = (11, 16, 22, 28, 31, 33, 35, 37, 39, 44, 85)
"""Deciles of the answers' lengths in Llama-3 tokens, from the shortest to the longest."""
_INSTRUCTION = (1, 10, 17, 30, 55, 94, 141, 205, 262, 342, 500)

WORDS = (
    *("the", "of", "and", "to", "in", "that", "for", "with", "as", "on", "are", "this", "be", "from", "have", "or"),
    *("water", "light", "house", "small", "river", "people", "time", "world", "history", "number", "music", "paper"),
    *("green", "mountain", "city", "garden", "question", "answer", "school", "table", "summer", "winter", "story"),
)
"""Each is one token of Llama-3's tokenizer, with the space before it."""


def _between(deciles: tuple[int, ...], share: float) -> int:
    """The length at a share (0 to 1) of the distribution, linear between deciles."""
    place = share * (len(deciles) - 1)
    low = min(int(place), len(deciles) - 2)
    return round(deciles[low] + (place - low) * (deciles[low + 1] - deciles[low]))


def _rows(deciles: tuple[int, ...], count: int, prompt: int, seed: int) -> list[dict[str, str]]:
    source = random.Random(seed)
    lengths = [_between(deciles, (i + 0.5) / count) for i in range(count)]
    source.shuffle(lengths)

    def text(words: int) -> str:
        return " ".join(source.choices(WORDS, k=max(words, 1)))

    return [
        {"instruction": text(source.randint(prompt // 2, prompt * 3 // 2)), "input": "", "output": text(length)}
        for length in lengths
    ]


def write_rows(folder: Path) -> None:
    """Write `identity` and `alpaca_en_demo` with their `dataset_info.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    sets = {
        "identity": _rows(_IDENTITY, IDENTITY_ROWS, prompt=6, seed=1),
        "alpaca_en_demo": _rows(_INSTRUCTION, INSTRUCTION_ROWS, prompt=18, seed=2),
    }
    for name, rows in sets.items():
        (folder / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    info = {name: {"file_name": f"{name}.json"} for name in sets}
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
