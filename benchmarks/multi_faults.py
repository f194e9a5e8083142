"""`fourfold train` itself on several ranks: losses by strategy, a worker that is killed, checkpoints on fewer ranks.

Runs are a small llama in fp32, from the same seed on the same samples, so that losses are compared at every step:
within 1e-5, as in multi_equality.py. `kill` sends SIGKILL to one worker in the middle of a step, takes the time until
the command has ended and looks for the cause in what it says; then the run goes on from its last checkpoint on half as
many ranks. `resume` takes a checkpoint of another layout, written by each rank for itself, to half as many ranks and,
from 8, to 2. Each is held against a run on all ranks that nothing happened to.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from made_up_rows import write_rows

TOLERANCE = 1e-5
END_WITHIN_S = 30.0
_MOST_S = 180.0
STEPS, SAVED, KILLED = 24, 8, 11
"""Steps of a run, between checkpoints, and after which a worker is killed: late enough for one checkpoint, early enough
that the run cannot have ended."""
_SAVING = {"save_strategy": "steps", "save_steps": SAVED, "save_sharded": True}
COMMANDS: dict[str, dict[str, Any]] = {
    "one": {"nproc": 1},
    "auto": {},
    "ddp": {"strategy": "ddp"},
    "zero3": {"strategy": "zero3"},
    "tp": {"strategy": "tp"},
    "pp": {"strategy": "pp"},
}
"""Keys by which the command itself is tried."""
_SHAPE = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "vocab_size": 8192}
_TINY_SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "vocab_size": 512}


@dataclass(frozen=True, slots=True)
class Bench:
    """Where runs lie, and how large they are.

    Attributes:
        deadline: seconds since 1970 at which a run is ended; each is after three minutes.
    """

    work: Path
    ranks: int
    is_tiny: bool
    deadline: float

    @property
    def limit_s(self) -> float:
        """Seconds that a run may take."""
        return max(min(_MOST_S, self.deadline - time.time()), 0.0)

    def config(self, name: str, keys: dict[str, Any]) -> Path:
        """The config file of a run, whose model and data are made where they are not there yet."""
        model, data = self.work / "command-model", self.work / "command-data"
        if not model.exists():
            _write_model(model, _TINY_SHAPE if self.is_tiny else _SHAPE)
            write_rows(data)
        content = {
            "stage": "sft",
            "do_train": True,
            "model_name_or_path": str(model),
            "train_from_scratch": True,
            "finetuning_type": "full",
            "dataset_dir": str(data),
            "dataset": "identity,alpaca_en_demo",
            "template": "llama3",
            "cutoff_len": 128 if self.is_tiny else 1024,
            "global_batch_size": 8 if self.is_tiny else 32,
            "learning_rate": 1e-3,
            "max_steps": STEPS,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "nproc": self.ranks,
            "use_cpu": self.is_tiny,
            "output_dir": str(self.folder(name)),
            **keys,
        }
        file = self.work / f"{name}.json"
        file.write_text(json.dumps(content), encoding="utf-8")
        return file

    def folder(self, name: str) -> Path:
        """The output of a run."""
        return self.work / f"run-{name}"

    def losses(self, name: str) -> dict[int, float]:
        """By step, of what a run has logged so far."""
        return {step: loss for step, loss, _ in self.rows(name)}

    def rows(self, name: str) -> list[tuple[int, float, float]]:
        """Step, loss and tokens/s of what a run has logged so far."""
        log = self.folder(name) / "trainer_log.jsonl"
        if not log.exists():
            return []
        lines = [line for line in log.read_text(encoding="utf-8").split("\n")[:-1] if '"loss"' in line]
        rows = [json.loads(line) for line in lines]
        return [(row["current_steps"], row["loss"], row["throughput"]) for row in rows]

    def start(self, name: str, keys: dict[str, Any]) -> subprocess.Popen[bytes]:
        """Begin a run; what it says goes into a file."""
        command = [sys.executable, "-m", "fourfold", "train", str(self.config(name, keys))]
        with (self.work / f"{name}.log").open("wb") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def said(self, name: str) -> str:
        """What a run said."""
        return (self.work / f"{name}.log").read_text(encoding="utf-8", errors="replace")

    def run(self, name: str, keys: dict[str, Any]) -> float:
        """A run to its end; returns its seconds.

        Raises:
            RuntimeError: it failed, or did not end in time.
        """
        started = time.perf_counter()
        process = self.start(name, keys)
        if self.end_of(process, self.limit_s) != 0:
            raise RuntimeError(f"{name}: exit code {process.returncode}\n{self.said(name)[-2500:]}")
        return time.perf_counter() - started

    def end_of(self, process: subprocess.Popen[bytes], limit_s: float) -> int | None:
        """The exit code; None for a run that had to be killed, with all its workers."""
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None


def _write_model(folder: Path, shape: dict[str, int]) -> None:
    """A config and a tokenizer; the weights are made at random from the run's seed."""
    from word_tokenizer import save_tokenizer  # heavy, and only needed where something is run

    save_tokenizer(folder, shape["vocab_size"])
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 4096}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **heads, **shape}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def command(bench: Bench, name: str) -> dict[str, Any]:
    """Losses and speed of the command with some keys."""
    seconds = bench.run(name, COMMANDS[name])
    rows = bench.rows(name)
    speeds = sorted(speed for _, _, speed in rows[4:])
    shutil.rmtree(bench.folder(name))
    return {
        "losses": [loss for _, loss, _ in rows],
        "tokens_per_sec": speeds[len(speeds) // 2],
        "command_s": seconds,
        "chosen": _chosen(bench.said(name)),
    }


def kill(bench: Bench) -> dict[str, Any]:
    """Kill a worker in the middle of a step, and go on with half as many."""
    layout = {"strategy": "zero3"}
    whole = _uninterrupted(bench, "kill-whole", layout)
    keys = {**layout, **_SAVING}
    process = bench.start("kill", keys)
    _wait_for_step(bench, process, "kill", KILLED)
    time.sleep(0.005 if bench.is_tiny else 0.03)  # about half a step
    workers = workers_of(process.pid)
    os.kill(workers[-1], signal.SIGKILL)
    killed = time.perf_counter()
    code = bench.end_of(process, 2 * END_WITHIN_S)
    ended_after_s = time.perf_counter() - killed
    said, before, fewer = bench.said("kill"), bench.losses("kill"), bench.ranks // 2
    if max(before) >= STEPS:
        raise RuntimeError("the run had ended before its worker was killed")
    resume_s = bench.run("kill", {**keys, "nproc": fewer, "resume_from_checkpoint": True})
    after = bench.losses("kill")
    return {
        "exit_code": code,
        "ended_after_s": ended_after_s,
        "cause": next((line for line in said.splitlines() if "SIGKILL" in line), "not told"),
        "left_running": [pid for pid in workers if Path(f"/proc/{pid}").exists()],
        "killed_after_step": max(before),
        "largest_difference_before": _apart(before, whole),
        "resumed_ranks": fewer,
        "resumed_at_step": _continued_at(bench.said("kill")),
        "resumed_steps": len(after),
        "largest_resumed_difference": _apart(after, whole),
        "resume_s": resume_s,
    }


def resume(bench: Bench) -> dict[str, Any]:
    """A checkpoint of all ranks, on fewer."""
    sizes = {2: {"tp": 2}, 4: {"tp": 2, "dp_shard": 2}, 8: {"tp": 2, "dp_shard": 4}}[bench.ranks]
    whole = _uninterrupted(bench, "resume-whole", {"parallel": sizes, **_SAVING})
    found: dict[str, Any] = {"written_by": sizes, "resumed": {}}
    for fewer in sorted({bench.ranks // 2, min(2, bench.ranks // 2)}):
        name = f"resume-{fewer}"
        checkpoint = bench.folder("resume-whole") / f"checkpoint-{SAVED}"
        keys = {"nproc": fewer, "strategy": "fsdp", "resume_from_checkpoint": str(checkpoint)}
        seconds = bench.run(name, keys)
        after = bench.losses(name)
        found["resumed"][str(fewer)] = {"steps": len(after), "difference": _apart(after, whole), "seconds": seconds}
    found["largest_resumed_difference"] = max(one["difference"] for one in found["resumed"].values())
    return found


def workers_of(pid: int) -> list[int]:
    """Processes that a command has started to train in, in the order of their start."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        found += [int(child) for child in task.read_text(encoding="utf-8").split()]
    return sorted(child for child in found if "resource_tracker" not in _command_line(child))


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "resource_tracker"  # it is gone, so no worker


def _uninterrupted(bench: Bench, name: str, keys: dict[str, Any]) -> dict[int, float]:
    bench.run(name, keys)
    return bench.losses(name)


def _wait_for_step(bench: Bench, process: subprocess.Popen[bytes], name: str, step: int) -> None:
    end = time.monotonic() + bench.limit_s
    while time.monotonic() < end and process.poll() is None:
        rows = bench.rows(name)
        if rows and rows[-1][0] >= step:
            return
        time.sleep(0.005)
    bench.end_of(process, 0)
    raise RuntimeError(f"{name}: did not get to step {step}\n{bench.said(name)[-2500:]}")


def _apart(found: dict[int, float], whole: dict[int, float]) -> float:
    return max(abs(loss - whole[step]) for step, loss in found.items())


def _continued_at(said: str) -> int:
    """The step after which a run says that it went on; 0 for none."""
    found = re.findall(r"Continuing at step (\d+)", said)
    return int(found[0]) if found else 0


def _chosen(said: str) -> str:
    """The layout, from what the command said."""
    return next((line.split("workers: ")[1] for line in said.splitlines() if "workers: " in line), "one process")
