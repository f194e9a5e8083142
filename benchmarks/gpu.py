"""Benchmarks for one GPU: Fourfold beside its peers, a process each, on the same machine in the same call.

    python benchmarks/gpu.py [--only chat_nf4,dpo] [--sides fourfold,hf_tuned] [--no-peers] [--budget SECONDS]
                             [--steps N] [--set key=value ...] [--profile] [--work FOLDER] [--out FOLDER] [--tiny]

chat_nf4, chat_bf16          LoRA on 591 chats, 8 a step, of a Llama-3-8B shape in nf4 and in bf16: samples/s.
chat_low                     the same in nf4 in the least memory (memory: low).
lora_4k                      LoRA of the same on two rows of 4,096 tokens a step, without recompute: tokens/s.
full_3b, full_3b_recompute   full tuning of a Llama-3.2-3B shape, fp32 masters, 4,096 tokens; 2 rows, and 4 recomputed.
full_3b_four, full_3b_eight  4 and 8 rows a step, none recomputed.
full_3b_float8 (_four, _eight)  2 (4, 8) rows a step with products in float8.
moe                          full tuning of 8 layers of a Qwen3-30B-A3B shape in bf16, 4,096 tokens.
dpo                          LoRA of the 8B on pairs of 1,024 tokens a side, 4 pairs a step.
hybrid_chat, hybrid_4k       chats, and rows of 4,096 tokens, with LoRA of a Qwen3.5-9B shape (gated delta nets).
long                         LoRA of the 8B on one sequence of 131,072 tokens; how long a peer's may be.
families                     the test suite with this machine's torch, on its CPU and its GPU; only when named.

Weights are random; speed does not depend on them. A side is `fourfold`, one of the workload's peers
(gpu_workloads.py), or `fourfold_warm`: once more, with what the first left in the caches. `--set` is Fourfold's command
line, so that variants can be compared. Results are merged into OUT/gpu.json, where a run takes the place of an earlier
one of the same case. With `--work` models and caches stay for the next call. `--tiny` runs everything on any machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpu_material import fourfold_config, make_data, make_model, write_peer_rows
from gpu_results import FOURFOLD, add_floor, compare, merge, show
from gpu_suite import ROOT, families
from gpu_workloads import WORKLOADS, Peer, Setting, Workload, tiny

HERE = Path(__file__).parent
WARM = f"{FOURFOLD}_warm"
_LOG_CHARACTERS = 1500


class Bench:
    """One workload: its model and rows, and the processes that train it."""

    def __init__(self, name: str, args: argparse.Namespace, work: Path) -> None:
        self.name, self.args, self.work = name, args, work
        self.workload: Workload = tiny(WORKLOADS[name]) if args.tiny else WORKLOADS[name]
        most = self.workload.steps or (args.warmup, args.steps)
        self.warmup, self.steps = min(args.warmup, most[0]), min(args.steps, most[1])
        tokenizer = args.tokenizer if self.workload.data == "chat" else None
        model = make_model(self.workload, work, is_tiny=args.tiny, tokenizer=tokenizer)
        data = make_data(self.workload, work, is_tiny=args.tiny) if self._made_up else args.dataset_dir
        self.config = fourfold_config(self.workload, model, data, self.warmup + self.steps)

    @property
    def _made_up(self) -> bool:
        return self.args.dataset_dir is None or self.workload.data != "chat"

    def sides(self) -> list[str]:
        """Who is measured, in order."""
        known = [FOURFOLD, WARM, *self.workload.peers]
        if self.args.sides is not None:
            return [side for side in known if side in self.args.sides]
        return [FOURFOLD, *(self.workload.peers if self.args.peers else ())]

    def run(self, side: str) -> dict[str, Any]:
        """Measure one side in processes of its own."""
        if side in (FOURFOLD, WARM):
            return self._fourfold(side)
        peer = self.workload.peers[side]
        if peer.needs is not None and not _is_installed(peer.needs):
            return {"missing": f"{peer.needs} is not installed"}
        found: dict[str, Any] = {}
        for setting in peer.settings:
            job = self.peer_job(peer, setting)
            found = self._process(peer.program, side, job) | {"setting": asdict(setting)}
            if "out_of_memory" not in found:
                break
        return found

    def _fourfold(self, side: str) -> dict[str, Any]:
        caches = self.work / "caches"
        if self.args.cold and side == FOURFOLD:
            shutil.rmtree(caches, ignore_errors=True)
        had_caches = caches.exists()
        job = self.fourfold_job()
        found = self._process("gpu_fourfold.py", side, job)
        shutil.rmtree(job["config"]["output_dir"], ignore_errors=True)
        return found | {"had_caches": had_caches}

    def fourfold_job(self) -> dict[str, Any]:
        """What Fourfold's side is told."""
        job = {
            "config": {**self.config, "output_dir": str(self.work / f"output-{self.name}")},
            "overrides": self.args.set,
            "saves": self.workload.keys["finetuning_type"] == "lora" and not self.args.profile,
            "profile": self.args.profile,
        }
        return job | self._pace()

    def peer_job(self, peer: Peer, setting: Setting) -> dict[str, Any]:
        """What a peer is told; its rows are made, if they are not there."""
        rows = self.work / f"rows-{self.name}.json"
        if not rows.exists():
            write_peer_rows(self.config, self.warmup + self.steps, rows)
        keys = self.workload.keys
        job = {
            **asdict(setting),
            "model": self.config["model_name_or_path"],
            "rows": str(rows),
            "nf4": self.workload.nf4,
            "tuning": keys["finetuning_type"],
            "pure_bf16": keys.get("pure_bf16", False),
            "learning_rate": keys["learning_rate"],
            "seq_len": self.workload.seq_len,
            "loop": peer.loop,
            "experts": peer.experts,
            "attention": peer.attention,
            "liger": peer.needs == "liger_kernel",
        }
        return job | self._pace()

    def _pace(self) -> dict[str, Any]:
        return {"warmup": self.warmup, "steps": self.steps, "process_started": time.time()}

    def _process(self, script: str, side: str, job: dict[str, Any]) -> dict[str, Any]:
        file, result = self.work / "job.json", self.work / "result.json"
        result.unlink(missing_ok=True)
        job["process_started"] = time.time()
        file.write_text(json.dumps(job), encoding="utf-8")
        log = self.args.out / "logs" / f"{self.name}-{side}.log"
        with log.open("w", encoding="utf-8") as output:
            try:
                status: int | str = subprocess.run(
                    [sys.executable, str(HERE / script), str(file), str(result)],
                    stdout=output,
                    stderr=output,
                    env={**os.environ, **_caches(self.work / "caches"), **self._bytecode()},
                    timeout=self.args.timeout,
                    check=False,
                ).returncode
            except subprocess.TimeoutExpired:
                status = f"stopped after {self.args.timeout:.0f} s"
        text = log.read_text(encoding="utf-8", errors="replace")
        found = {"took_s": time.time() - job["process_started"]}
        if status != 0 or not result.exists():
            print(text[-_LOG_CHARACTERS:], flush=True)
            return {**found, "failed": f"{status}, {text.strip().splitlines()[-1] if text.strip() else 'no output'}"}
        return {**found, **json.loads(result.read_text(encoding="utf-8"))}

    def _bytecode(self) -> dict[str, str]:
        """Have modules compiled once, as an installation has them, also where the machine is told not to."""
        return {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(self.work / "bytecode")}


def _caches(folder: Path) -> dict[str, str]:
    """Where a run keeps what it can make again: apart from the machine's own, so that a first run is a first run."""
    return {
        "FOURFOLD_CACHE": str(folder / "fourfold"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "UNSLOTH_COMPILE_LOCATION": str(folder / "unsloth"),
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _is_installed(package: str) -> bool:
    command = [sys.executable, "-c", f"import importlib.util, sys; sys.exit(not importlib.util.find_spec('{package}'))"]
    return subprocess.run(command, check=False).returncode == 0


def run_workload(name: str, args: argparse.Namespace, work: Path) -> bool:
    """Measure the sides of a workload for which there is time; false if one of them failed."""
    if time.monotonic() > args.deadline:
        print(f"{name}: left out, the budget is spent", flush=True)
        return True
    started = time.monotonic()
    bench = Bench(name, args, work)
    print(f"== {name}: model and rows ready after {time.monotonic() - started:.1f} s", flush=True)
    variant = f"[{','.join(args.set)}]" if args.set else ""
    results: dict[str, dict[str, Any]] = {}
    for side in bench.sides():
        case = f"{name}/{side}{variant if side in (FOURFOLD, WARM) else ''}"
        if time.monotonic() > args.deadline:
            print(f"{case}: left out, the budget is spent", flush=True)
            continue
        found = results[side] = bench.run(side)
        add_floor(bench.workload, found)
        show(case, bench.workload, found)
        merge(args.out, case, found)
    compare(name, bench.workload, results)
    return not any("failed" in found for found in results.values())


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, from the command line if no words are given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(WORKLOADS), help="workloads, separated by commas")
    parser.add_argument("--sides", type=lambda text: text.split(","), help="of these sides, separated by commas")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True, help="measure the peers too")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no case is begun")
    parser.add_argument("--timeout", type=float, default=240, help="seconds of one case at most")
    parser.add_argument("--warmup", type=int, default=4, help="steps that are not counted")
    parser.add_argument("--steps", type=int, default=12, help="steps that are counted")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for Fourfold's command line")
    parser.add_argument("--cold", action="store_true", help="empty the caches before Fourfold's side")
    parser.add_argument("--profile", action="store_true", help="profile one more step of Fourfold")
    parser.add_argument("--tokenizer", type=Path, help="folder of the Llama-3 tokenizer; default: one token a word")
    parser.add_argument("--dataset-dir", type=Path, help="of identity and alpaca_en_demo; default: made-up rows")
    parser.add_argument("--work", type=Path, help="folder for models and caches that stays; default: one that does not")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ROOT / "runs" / "benchmarks")))
    parser.add_argument("--workers", type=int, default=0, help="families: processes of the test suite (pytest-xdist)")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the script out on any machine")
    args = parser.parse_args(words)
    args.names = args.only.split(",")
    unknown = [name for name in args.names if name not in (*WORKLOADS, "families")]
    if unknown:
        parser.error(f"--only: {', '.join(unknown)} is no workload. Use {', '.join((*WORKLOADS, 'families'))}.")
    args.deadline = time.monotonic() + args.budget
    return args


def main() -> None:
    args = parse_arguments()
    (args.out / "logs").mkdir(parents=True, exist_ok=True)
    work = args.work or Path(tempfile.mkdtemp(prefix="fourfold-"))
    os.environ |= _caches(work / "caches-of-rows")  # rows for the peers are made here, and leave the others cold
    passed = True
    try:
        for name in args.names:
            # every case runs, whatever became of the one before
            passed &= families(args) if name == "families" else run_workload(name, args, work)
    finally:
        if args.work is None:
            shutil.rmtree(work)
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
