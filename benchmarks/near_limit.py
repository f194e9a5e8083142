"""Jobs that need nearly all of a card's memory or a little more: is the planner's verdict right?

    python benchmarks/near_limit.py [--list] [--only TEXT] [--budget SECONDS] [--out FILE]

Twenty jobs, made for the card at hand: for each of ten models and layouts the length of its sequences is chosen so that
the planner says 90 to 99 % of the card, and once more for 101 to 115 %. Each is run for real; whether the memory ran
out is compared with the verdict. Imagined partners have no communicators: as much is held instead, where there are
some. How points run: `rehearsed.py`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from environment import environment
from fourfold.planning.device import Device
from fourfold.planning.hardware import find_device
from fourfold.planning.layout import Layout
from fourfold.planning.memory import COMMUNICATOR
from rehearsed import GIB, Point, arguments, predict_again, predicted_memory, run_points

_STEP = 64
_LONGEST = 2**18


def bases() -> list[Point]:
    """What is trained; lengths are found below."""
    one, three, eight = "Llama-3.2-1B", "Llama-3.2-3B", "Llama-3-8B"
    return [
        Point(one, "full", Layout(), "none"),
        Point(one, "full", Layout(), "selective"),
        Point(three, "pure", Layout(), "none"),
        Point(three, "lora", Layout(), "selective"),
        Point(eight, "lora", Layout(), "none"),
        Point(eight, "qlora", Layout(), "none"),
        Point(eight, "lora", Layout(tp=2), "selective"),
        Point(eight, "full", Layout(dp_shard=8), "selective"),
        Point("Llama-3.1-70B", "lora", Layout(dp_shard=8), "full"),
        Point("Qwen3-30B-A3B", "lora", Layout(), "selective", layers=16),
    ]


SHARES = (0.905, 0.92, 0.93, 0.94, 0.95, 0.96, 0.97, 0.975, 0.98, 0.985)
MORE = (1.015, 1.02, 1.03, 1.04, 1.05, 1.06, 1.08, 1.10, 1.12, 1.14)


def sized(base: Point, card: Device, share: float) -> Point:
    """A point whose sequence takes nearest to a share of the card, as predicted."""
    limit = share * card.memory_gib * GIB

    def with_length(steps: int) -> Point:
        return replace(base, sequences=(steps * _STEP,))

    low, high = 1, _LONGEST // _STEP
    while low < high:
        middle = (low + high + 1) // 2
        if predicted_memory(with_length(middle), card).device <= limit:
            low = middle
        else:
            high = middle - 1
    return with_length(low)


def points(card: Device) -> Iterator[Point]:
    """The twenty, within and beyond in turn."""
    for base, within, beyond in zip(bases(), SHARES, reversed(MORE), strict=True):
        yield sized(base, card, within)
        yield sized(base, card, beyond)


def verdicts(rows: list[dict[str, Any]], card: Device) -> dict[str, Any]:
    """How many were right, and which were not."""
    told = [row for row in rows if "predicted_device_gib" in row]
    wrong = []
    for row in told:
        share = row["predicted_device_gib"] / card.memory_gib
        if (share <= 1) != ("out_of_memory" not in row):
            wrong.append(f"{row['point']}: {100 * share:.1f} % predicted")
    return {"points": len(told), "failed": len(rows) - len(told), "right": len(told) - len(wrong), "wrong": wrong}


def main() -> None:
    """Run what is missing, then report on all."""
    parser = arguments(__doc__, "near_limit")
    parser.add_argument("--list", help="only say what would be run on this card, e.g. h100", metavar="GPU")
    args = parser.parse_args()
    if args.list:
        card = find_device(args.list)
        for point in points(card):
            share = predicted_memory(point, card).device / GIB / card.memory_gib
            sys.stdout.write(f"{100 * share:6.1f} %  {point.name}\n")
        return
    if args.again:
        rows = predict_again(args.out)
        card = find_device(rows[0]["gpu"])
        print(json.dumps({"card_gib": card.memory_gib, **verdicts(rows, card)}, indent=1))
        return
    card = find_device(torch.cuda.get_device_name(0))
    rows: list[dict[str, Any]] = []
    deadline = time.monotonic() + args.budget
    for point in points(card):
        held = COMMUNICATOR if point.layout.world_size > 1 else 0
        ballast = torch.empty(held, dtype=torch.uint8, device="cuda")
        args.budget = deadline - time.monotonic()
        rows = run_points([point], args)
        del ballast
    print(json.dumps({"environment": environment(), "card_gib": card.memory_gib, **verdicts(rows, card)}, indent=1))


if __name__ == "__main__":
    main()
