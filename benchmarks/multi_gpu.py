"""The layouts on several GPUs of one machine, through NCCL, as `fourfold train` runs them.

    python benchmarks/multi_gpu.py --tokenizer FOLDER [--only equality,throughput] [--budget SECONDS] [--out FOLDER]

equality     a small llama under every layout against one GPU: losses of 10 steps, fp32 and bf16.
throughput   a 1B-parameter llama, full and LoRA in bf16: tokens/s and peak memory of rank 0.
experts      a 0.9B-parameter qwen3_moe, sharded with and without expert parallelism: losses in fp32, speed in bf16;
             only when named.
ddp_variants what of a replica's step costs time (ddp_variants.py); only when named.

Each run is the command that a user types, in a process of its own. Results are merged into FOLDER/multi_gpu.json.
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
from statistics import median
from typing import Any

import torch
from transformers import LlamaConfig, PreTrainedConfig, Qwen3MoeConfig

from environment import environment
from made_up_rows import write_rows

SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
LARGE = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
PRECISIONS = ["fp32", "bf16"]
TUNINGS = ["full", "lora"]
MIXTURE = {
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 768,
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "ddp": (0, {"strategy": "ddp"}),
    "zero1": (0, {"strategy": "zero1"}),
    "zero2": (0, {"strategy": "zero2"}),
    "zero3": (0, {"strategy": "zero3"}),
    "hsdp": (0, {"strategy": "hsdp"}),
    "tp": (0, {"strategy": "tp"}),
    "tp_whole_positions": (0, {"strategy": "tp", "parallel": {"sequence_parallel": False}}),
    "pp_1f1b": (0, {"strategy": "pp"}),
    "pp_zbv": (0, {"strategy": "pp", "parallel": {"pp_schedule": "zbv"}}),
    "cp_allgather": (2, {"parallel": {"cp": 2}}),
    "cp_ulysses": (2, {"parallel": {"cp": 2, "cp_method": "ulysses"}}),
    "cp_ring": (2, {"parallel": {"cp": 2, "cp_method": "ring"}}),
}
"""Processes (0: one a GPU) and keys of each layout."""


def write_model(folder: Path, tokenizer: Path, shape: dict[str, int]) -> Path:
    """A config and a tokenizer; the weights are made at random from the run's seed."""
    shutil.copytree(tokenizer, folder)
    heads = shape["hidden_size"] // 64
    kind: type[PreTrainedConfig] = Qwen3MoeConfig if "num_experts" in shape else LlamaConfig
    config = kind(**shape, vocab_size=128256, num_attention_heads=heads, num_key_value_heads=max(heads // 4, 1))
    config.save_pretrained(folder)
    return folder


def run_training(work: Path, model: Path, data: Path, name: str, keys: dict[str, Any], limit: float) -> dict[str, Any]:
    """Run `fourfold train` and read what it logged."""
    output = work / name
    config = {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": str(model),
        "train_from_scratch": True,
        "dataset_dir": str(data),
        "dataset": "identity,alpaca_en_demo",
        "dataset_vars": {"name": "Fourfold", "author": "the Fourfold project"},
        "template": "llama3",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "output_dir": str(output),
        **keys,
    }
    file = work / f"{name}.json"
    file.write_text(json.dumps(config), encoding="utf-8")
    started = time.perf_counter()
    with (work / f"{name}.log").open("w", encoding="utf-8") as log:
        command = [sys.executable, "-m", "fourfold", "train", str(file)]
        try:
            status = subprocess.run(command, stdout=log, stderr=log, timeout=limit, check=False).returncode
        except subprocess.TimeoutExpired:
            status = None
    seconds = time.perf_counter() - started
    if status != 0:
        return {"exit_status": status, "seconds": seconds, "log": (work / f"{name}.log").read_text()[-1500:]}
    rows = [json.loads(line) for line in (output / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if "loss" in row]
    shutil.rmtree(output)
    return {
        "exit_status": status,
        "seconds": seconds,
        "losses": [row["loss"] for row in rows],
        "tokens_per_sec": median(row["throughput"] for row in rows[2:]) if len(rows) > 3 else None,
        "peak_allocated_gib": max((row.get("vram_allocated", 0.0) for row in rows), default=None),
    }


def equality(work: Path, model: Path, data: Path, gpus: int, limit: float) -> dict[str, Any]:
    """Losses of every layout against one GPU."""
    found: dict[str, Any] = {}
    common = {"max_steps": 10, "global_batch_size": 8, "learning_rate": 1e-3, "cutoff_len": 512}
    for precision in PRECISIONS:
        for tuning in TUNINGS:
            for layout, (processes, keys) in LAYOUTS.items():
                if layout == "hsdp" and gpus < 4:
                    continue
                settings = {**common, **keys, "finetuning_type": tuning, "bf16": precision == "bf16"}
                settings["nproc"] = processes or gpus
                name = f"equality_{precision}_{tuning}_{layout}"
                found[name] = run_training(work, model, data, name, settings, limit)
                one = found[f"equality_{precision}_{tuning}_one"].get("losses")
                if one and (losses := found[name].get("losses")):
                    found[name]["largest_difference"] = max(abs(a - b) for a, b in zip(losses, one, strict=True))
                _show(name, found[name])
    return found


def throughput(work: Path, model: Path, data: Path, gpus: int, limit: float) -> dict[str, Any]:
    """Speed and memory; every rank has the same number of samples, so one GPU does 1/N of a step's work."""
    found: dict[str, Any] = {}
    for tuning in TUNINGS:
        for layout, (processes, keys) in LAYOUTS.items():
            if layout == "hsdp" and gpus < 4:
                continue
            count = processes or gpus
            settings = {
                **keys,
                "max_steps": 12,
                "finetuning_type": tuning,
                "bf16": True,
                "nproc": count,
                "packing": True,
                "cutoff_len": 2049,
                "num_train_epochs": 100,
                "per_device_train_batch_size": 4,
            }
            name = f"throughput_{tuning}_{layout}"
            found[name] = run_training(work, model, data, name, settings, limit)
            _show(name, found[name])
    return found


def experts(work: Path, model: Path, data: Path, gpus: int, limit: float) -> dict[str, Any]:
    """Experts gathered layer by layer (zero3) against experts that stay where they are (ep)."""
    found: dict[str, Any] = {}
    common = {"nproc": gpus, "strategy": "fsdp", "finetuning_type": "full", "learning_rate": 1e-4}
    settings = {
        "fp32": {"max_steps": 10, "global_batch_size": 8, "cutoff_len": 512},
        "bf16": {"max_steps": 12, "bf16": True, "packing": True, "cutoff_len": 2049, "num_train_epochs": 100},
    }
    for precision, keys in settings.items():
        for layout, parallel in (("zero3", {}), ("ep", {"ep": gpus})):
            name = f"experts_{precision}_{layout}"
            found[name] = run_training(work, model, data, name, {**common, **keys, "parallel": parallel}, limit)
            sharded = found[f"experts_{precision}_zero3"].get("losses")
            if sharded and (losses := found[name].get("losses")):
                found[name]["largest_difference"] = max(abs(a - b) for a, b in zip(losses, sharded, strict=True))
            _show(name, found[name])
    return found


def ddp_variants(work: Path, model: Path, data: Path, gpus: int, limit: float) -> dict[str, Any]:
    """Run ddp_variants.py by torchrun."""
    script = Path(__file__).with_name("ddp_variants.py")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(gpus)]
    subprocess.run([*launcher, str(script), "--out", str(work)], timeout=limit, check=True)
    return {"ddp_variants": json.loads((work / "ddp_variants.json").read_text(encoding="utf-8"))}


def _show(name: str, found: dict[str, Any]) -> None:
    keys = ("exit_status", "seconds", "largest_difference", "tokens_per_sec", "peak_allocated_gib")
    shown = (f"{key} {found[key]:.6g}" for key in keys if isinstance(found.get(key), int | float))
    print(f"{name:32} {'  '.join(shown)}", flush=True)
    if found["exit_status"] != 0:
        print(found.get("log", ""), flush=True)


CASES = {
    "equality": (equality, SMALL),
    "throughput": (throughput, LARGE),
    "experts": (experts, MIXTURE),
    "ddp_variants": (ddp_variants, SMALL),
}


def main() -> None:
    """Run the chosen cases until the budget is spent."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="equality,throughput", help="cases, separated by commas")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of the Llama-3 tokenizer")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds of one run at most")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "runs/benchmarks")))
    parser.add_argument("--layouts", default=",".join(LAYOUTS), help="of these layouts, separated by commas")
    parser.add_argument("--precisions", default=",".join(PRECISIONS), help="of the equality runs")
    parser.add_argument("--tunings", default=",".join(TUNINGS))
    args = parser.parse_args()
    PRECISIONS[:] = args.precisions.split(",")
    TUNINGS[:] = args.tunings.split(",")
    for name in LAYOUTS.keys() - set(args.layouts.split(",")):
        del LAYOUTS[name]
    gpus = torch.cuda.device_count() or 2
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "multi_gpu.json"
    merged = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    work = Path(tempfile.mkdtemp(prefix="fourfold-"))
    write_rows(work / "data")
    for name in args.only.split(","):
        case, shape = CASES[name]
        model = write_model(work / f"model-{name}", args.tokenizer, shape)
        merged |= case(work, model, work / "data", gpus, args.budget)
        merged["environment"] = {**environment(), "gpus": gpus}
        file.write_text(json.dumps(merged, indent=1), encoding="utf-8")
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
