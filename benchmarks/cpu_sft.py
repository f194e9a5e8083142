"""LoRA SFT of SmolLM2-135M on a CPU: this project beside Transformers' Trainer with PEFT.

    python benchmarks/cpu_sft.py [--steps 8] [--rounds 1] [--threads 1] [--peers fourfold,hf_checkpointing,hf]

All peers train the same rows from the same adapter, so their losses must agree: a difference above 1e-5 is an error.
Each peer is a process of its own. Within a round they take turns, a step each, so that whatever else the machine does
falls on all of them; `cpu us/token` is processor time and hardly depends on it. The first step is not counted.
Tokens are the rows' own: padding is not.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

from cpu_peers import PEERS, Plan, make_common_files
from environment import environment
from step_clock import StepFigures, counted, summary

ROOT = Path(__file__).resolve().parent.parent
LOSS_TOLERANCE = 1e-5

CONFIG: dict[str, Any] = {
    "model_name_or_path": str(ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "template": "smollm2",
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "lora_target": "all",
    "lora_rank": 8,
    "dataset_dir": str(ROOT / "data"),
    "dataset": "identity,instruction_en",
    "mix_strategy": "interleave_over",
    "cutoff_len": 512,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 1.0,
    "disable_shuffling": True,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "output_dir": "",
}


class Peer:
    """One peer's process and the line to it."""

    def __init__(self, task: Callable[[Plan, Connection], None], plan: Plan) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=task, args=(plan, theirs))
        self._process.start()
        theirs.close()

    def receive(self) -> list[StepFigures] | None:
        """Wait until it is ready for its next step (None), or done (all its steps).

        Raises:
            SystemExit: it failed; its own error is on the screen.
        """
        try:
            return self._connection.recv()
        except EOFError:
            sys.exit(f"A peer ended with exit code {self._process.exitcode} before its last step.")

    def go(self) -> None:
        """Let it do one step."""
        self._connection.send(None)

    def join(self) -> None:
        self._process.join()


def run_round(names: list[str], plan: Plan) -> dict[str, list[StepFigures]]:
    """All peers side by side, taking turns step by step; each one's steps."""
    peers: dict[str, Peer] = {}
    for name in names:  # one after the other, so that loading disturbs nobody
        peers[name] = Peer(PEERS[name], plan)
        peers[name].receive()
    found: dict[str, list[StepFigures]] = {}
    for step in range(plan.steps):
        for name, peer in peers.items():
            peer.go()
            steps = peer.receive()
            if steps is not None:
                found[name] = steps
        print(f"  step {step + 1} of {plan.steps}", flush=True)
    for peer in peers.values():
        peer.join()
    return found


def loss_difference(rounds: list[dict[str, list[StepFigures]]]) -> float:
    """The largest difference of any two peers' losses in the same step; infinite where one is missing."""
    largest = 0.0
    for found in rounds:
        for steps in zip(*found.values(), strict=True):
            losses = [math.inf if s.loss is None else s.loss for s in steps]
            largest = max(largest, max(losses) - min(losses) if math.inf not in losses else math.inf)
    return largest


def compare(names: list[str], rounds: list[dict[str, list[StepFigures]]]) -> dict[str, dict[str, float]]:
    """Each peer's medians over all counted steps, and how many times the Trainer with checkpointing it is."""
    base = "hf_checkpointing" if "hf_checkpointing" in names else names[-1]
    table: dict[str, dict[str, float]] = {}
    for name in names:
        pairs = [pair for found in rounds for pair in zip(counted(found[name]), counted(found[base]), strict=True)]
        table[name] = {
            "tokens_per_sec": median(own.tokens / own.seconds for own, _ in pairs),
            "cpu_us_per_token": 1e6 * median(own.cpu_seconds / own.tokens for own, _ in pairs),
            "peak_rss_gib": max(found[name][-1].peak_rss_bytes for found in rounds) / 2**30,
            "speed_ratio": median(other.seconds / own.seconds for own, other in pairs),
            "cpu_ratio": median(other.cpu_seconds / own.cpu_seconds for own, other in pairs),
        }
    return table


def show(table: dict[str, dict[str, float]], difference: float) -> None:
    """Print the comparison."""
    print(f"{'':18}{'tokens/s':>10}{'cpu us/token':>14}{'peak RSS GiB':>14}{'x speed':>9}{'x cpu':>8}")
    for name, row in table.items():
        print(
            f"{name:18}{row['tokens_per_sec']:10.1f}{row['cpu_us_per_token']:14.0f}{row['peak_rss_gib']:14.2f}"
            f"{row['speed_ratio']:9.2f}{row['cpu_ratio']:8.2f}"
        )
    verdict = "agree" if difference <= LOSS_TOLERANCE else "DISAGREE: the comparison is void"
    print(f"largest difference of a loss between peers: {difference:.1e}; they {verdict}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps of 8 rows")
    parser.add_argument("--rounds", type=int, default=1, help="how often all peers start anew")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    parser.add_argument("--peers", default=",".join(PEERS), help="separated by commas")
    parser.add_argument("--dataset", help="other sets of the dataset folder, separated by commas")
    parser.add_argument("--dataset-dir", help="another folder with a dataset_info.json")
    parser.add_argument("--model", help="another path of the model")
    parser.add_argument("--micro-batch-tokens", type=int, help="Fourfold's micro_batch_tokens; default: its own choice")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "benchmarks" / "cpu_sft.json")
    args = parser.parse_args()
    names = args.peers.split(",")
    if unknown := [name for name in names if name not in PEERS]:
        parser.error(f"--peers: {', '.join(unknown)} is none. Use {', '.join(PEERS)}.")
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    given = {"dataset": args.dataset, "dataset_dir": args.dataset_dir, "model_name_or_path": args.model}
    given["micro_batch_tokens"] = args.micro_batch_tokens
    work = Path(tempfile.mkdtemp(prefix="fourfold-"))
    config = {**CONFIG, "max_steps": args.steps, "output_dir": str(work / "unused")}
    plan = Plan(config | {key: value for key, value in given.items() if value}, work, args.steps, args.threads)
    try:
        Peer(make_common_files, plan).join()
        rounds = []
        for number in range(args.rounds):
            print(f"round {number + 1} of {args.rounds}", flush=True)
            rotated = names[number % len(names) :] + names[: number % len(names)]
            rounds.append(run_round(rotated, plan))
    finally:
        shutil.rmtree(work)
    table, difference = compare(names, rounds), loss_difference(rounds)
    show(table, difference)
    result = {
        "environment": environment(),
        "config": plan.config,
        "threads": args.threads,
        "table": table,
        "loss_difference": difference,
        "rounds": [{name: summary(steps) for name, steps in found.items()} for found in rounds],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(f"written to {args.out}")
    sys.exit(0 if difference <= LOSS_TOLERANCE else 1)


if __name__ == "__main__":
    main()
