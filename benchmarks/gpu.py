"""Benchmarks for one GPU.

    python benchmarks/gpu.py --only sft_nf4 --tokenizer FOLDER [--dataset-dir FOLDER] [--profile] [--out FOLDER]
    python benchmarks/gpu.py --only families [--out FOLDER]

sft_nf4    LoRA SFT of a Llama-3-8B shape in nf4 on 591 rows, in fp16 and in bf16: samples/s, memory, first step.
families   the test suite with this machine's torch and transformers, on its CPU and on its GPU.

`benchmarks/llama3_tokenizer.py` makes the tokenizer's folder. `--tiny` runs the whole script on any machine, with a
model of a few hundred kilobytes. Figures are printed, and written to FOLDER as JSON.
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
from pathlib import Path
from typing import Any

import torch

from gpu_sft_nf4 import CONFIG
from gpu_suite import ROOT, TESTS, run_suite
from made_up_rows import write_rows
from nf4_model import llama3_8b_config, write_nf4_model

_TINY_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_SHOWN = (
    *("samples_per_sec", "median_samples_per_sec", "tokens_per_sec", "s_per_step", "tokens_per_step", "num_steps"),
    *("micro_batch_tokens", "recompute", "load_s", "first_step_s", "train_s", "losses_finite", "loss_scale"),
    *("loaded_gib", "peak_allocated_gib", "peak_reserved_gib", "peak_rss_gib"),
)


def sft_nf4(args: argparse.Namespace, work: Path) -> bool:
    """Make the model, and train it in each precision in a process of its own."""
    model, data = work / "model", args.dataset_dir or work / "data"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    started = time.perf_counter()
    write_nf4_model(model, llama3_8b_config(**(_TINY_SHAPE if args.tiny else {})), args.tokenizer, device)
    if args.dataset_dir is None:
        write_rows(data)
    size = sum(file.stat().st_size for file in model.iterdir()) / 2**30
    print(f"sft_nf4: model of {size:.2f} GiB made in {time.perf_counter() - started:.1f} s", flush=True)
    # fp16 is refused on a CPU, where --tiny may run
    precisions = ("fp16", "bf16") if device.type == "cuda" else ("fp32", "bf16")
    passed = [_train(args, work, precision, model, data) for precision in precisions]
    return all(passed)


def _train(args: argparse.Namespace, work: Path, precision: str, model: Path, data: Path) -> bool:
    flags = {"fp16": precision == "fp16", "bf16": precision == "bf16"}
    config = {
        **CONFIG,
        **flags,
        "model_name_or_path": str(model),
        "dataset_dir": str(data),
        "output_dir": str(work / precision),
        **({"max_steps": args.max_steps} if args.max_steps else {}),
    }
    file, result = work / f"{precision}.json", args.out / f"sft_nf4_{precision}.json"
    file.write_text(json.dumps(config), encoding="utf-8")
    command = [sys.executable, str(Path(__file__).with_name("gpu_sft_nf4.py")), str(file), str(result)]
    done = subprocess.run([*command, *(["--profile"] if args.profile else [])], check=False)
    if done.returncode != 0:
        print(f"sft_nf4 {precision}: FAILED with exit status {done.returncode}", flush=True)
        return False
    _show(f"sft_nf4 {precision}", json.loads(result.read_text(encoding="utf-8")))
    return True


def _show(title: str, found: dict[str, Any]) -> None:
    print(f"== {title} on {found['device']}, torch {found['environment']['torch']}")
    for key in _SHOWN:
        value = found.get(key)
        if value is not None:
            print(f"   {key:24} {value:.4g}" if isinstance(value, float) else f"   {key:24} {value}")
    if losses := found["losses"]:
        print(f"   losses                   {losses[0]:.4f} ... {losses[-1]:.4f}")
    if "profile" in found:
        profile = found["profile"]
        cut = f"{profile['tokens']} tokens in {profile['micro_batches']} micro-batches"
        times = f"{profile['wall_ms']:.1f} ms a step, device busy {profile['device_busy_ms']:.1f} ms"
        print(f"   profile: {times}, {profile['kernels']} kernels, {cut}")
        print(profile["table"])
    sys.stdout.flush()


def families(args: argparse.Namespace, work: Path) -> bool:
    """Run the tests; where there is a GPU, once without and once with it."""
    tests = TESTS[:1] if args.tiny else TESTS
    passed = True
    results = []
    for on_gpu in (False, True) if torch.cuda.is_available() else (False,):
        found = run_suite(args.out, tests, on_gpu=on_gpu, workers=args.workers, timeout_s=args.timeout_s)
        results.append(found)
        print(f"families: {found['tests']} tests on the {found['device']}, {len(found['failures'])} failed, "
              f"exit status {found['exit_status']}")  # fmt: skip
        for failure in found["failures"]:
            print(f"   {failure['test']}\n      {failure['text'][-300:]}")
        passed = passed and found["exit_status"] == 0
    (args.out / "families.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    sys.stdout.flush()
    return passed


CASES = {"sft_nf4": sft_nf4, "families": families}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(CASES), help="cases, separated by commas")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ROOT / "runs" / "benchmarks")))
    parser.add_argument("--tokenizer", type=Path, help="folder of the Llama-3 tokenizer")
    parser.add_argument(
        "--dataset-dir", type=Path, help="folder with identity and alpaca_en_demo; default: made-up rows"
    )
    parser.add_argument("--max-steps", type=int, help="end sft_nf4 after so many steps")
    parser.add_argument("--profile", action="store_true", help="profile one step of sft_nf4 after training")
    parser.add_argument("--workers", type=int, default=0, help="processes of the test suite (pytest-xdist)")
    parser.add_argument("--timeout-s", type=float, default=280, help="limit of one run of the test suite")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the script out on any machine")
    args = parser.parse_args()
    names = args.only.split(",")
    unknown = [name for name in names if name not in CASES]
    if unknown:
        parser.error(f"--only: {', '.join(unknown)} is no case. Use {', '.join(CASES)}.")
    if "sft_nf4" in names and args.tokenizer is None:
        parser.error("--tokenizer: sft_nf4 needs it.")
    args.out.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="fourfold-"))
    try:
        # every case runs, whatever became of the one before
        passed = [CASES[name](args, work) for name in names]
    finally:
        shutil.rmtree(work)
    sys.exit(0 if all(passed) else 1)


if __name__ == "__main__":
    main()
