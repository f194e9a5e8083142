"""The file of gpu.py's figures, and what it prints of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gpu_floor import floor_tokens_per_sec, mfu, shape_of
from gpu_material import model_config
from gpu_workloads import Workload

FILE = "gpu.json"
FOURFOLD = "fourfold"


def merge(out: Path, case: str, found: dict[str, Any]) -> None:
    """Put a case into the file of results, in the place of an earlier run of it."""
    file = out / FILE
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"format_version": 1, "cases": {}}
    known["cases"][case] = found
    part = file.with_suffix(".part")
    part.write_text(json.dumps(known, indent=1), encoding="utf-8")
    part.replace(file)


def add_floor(workload: Workload, found: dict[str, Any]) -> None:
    """Tell beside the figures what the hardware would allow."""
    if not found.get("tokens_per_sec"):
        return
    shape = shape_of(model_config(workload))
    length = found.get("tokens") or workload.seq_len  # of what fits, where a peer does not get to the whole length
    tokens = floor_tokens_per_sec(shape, workload.cost, length)
    found["floor_tokens_per_sec"] = tokens
    found["floor_without_attention_tokens_per_sec"] = floor_tokens_per_sec(shape, workload.cost, 0)
    if workload.unit == "samples":
        found["floor_samples_per_sec"] = tokens * found["samples_per_step"] / found["tokens_per_step"]
    if workload.mfu:
        found["mfu"] = mfu(shape, workload.seq_len, found["tokens_per_sec"])


def speed_of(workload: Workload, found: dict[str, Any]) -> float | None:
    """The figure that a workload is compared by."""
    return found.get(f"{workload.unit}_per_sec")


def show(case: str, workload: Workload, found: dict[str, Any]) -> None:
    """Print a case's figures in a line or a few."""
    print(f"{case:32} {_line(workload, found)}", flush=True)
    for length in found.get("lengths", ()):
        memory = length.get("peak_allocated_gib", length["peak_rss_gib"])
        print(f"   {length['tokens']:>9,} tokens {length['s_per_step']:8.2f} s {memory:7.1f} GiB")
    if "lengths" in found:
        print(f"   out of memory at {found['out_of_memory_at'] or 'none of them'}", flush=True)
    if "profile" in found:
        profile = found["profile"]
        busy = f"{profile['wall_ms']:.1f} ms a step, device busy {profile['device_busy_ms']:.1f} ms"
        print(f"   profile: {busy}, {profile['kernels']} kernels, {profile['tokens']} tokens\n{profile['table']}")


def _line(workload: Workload, found: dict[str, Any]) -> str:
    for reason in ("missing", "failed", "out_of_memory"):
        if reason in found:
            return f"{reason.replace('_', ' ')}: {found[reason][:200]}"
    unit, speed = workload.unit, speed_of(workload, found)
    if speed is None:
        return "nothing fitted into memory"
    parts = [f"{speed:,.1f} {unit}/s"]
    if f"mean_{unit}_per_sec" in found:
        parts.append(f"{found[f'mean_{unit}_per_sec']:,.1f} by the mean")
    parts.append(f"{found['s_per_step']:.4f} s a step")
    floor = found[f"floor_{unit}_per_sec"]
    parts.append(f"floor {floor:,.0f} ({100 * speed / floor:.3g} %)")
    if "mfu" in found:
        parts.append(f"MFU {found['mfu']:.3f}")
    if "peak_allocated_gib" in found:
        parts.append(f"peak {found['peak_allocated_gib']:.1f} GiB (reserved {found['peak_reserved_gib']:.1f})")
    else:
        parts.append(f"peak {found['peak_rss_gib']:.2f} GiB of the host")
    parts.append(f"first step done after {found['startup_s']:.1f} s")
    if found.get("save_s") is not None:
        parts.append(f"all steps {found['all_steps_s']:.1f} s and the save {found['save_s']:.1f} s")
    if "setting" in found:
        setting = found["setting"]
        cut = f"{setting['micro_batch']}x{setting['accumulation']}"
        parts.append(f"cut {cut}{', checkpointing' if setting['checkpointing'] else ''}")
    else:
        parts.append(f"up to {found['micro_batch_tokens']:,} tokens at once, recompute {found['recompute']}")
    losses = found.get("losses")
    if losses:
        parts.append(f"losses {losses[0]:.4f} ... {losses[-1]:.4f}")
    return "; ".join(parts)


def compare(name: str, workload: Workload, results: dict[str, dict[str, Any]]) -> None:
    """Print how many times as fast as each peer Fourfold is."""
    own = speed_of(workload, results.get(FOURFOLD, {}))
    for side in [name for name in workload.peers if name in results]:
        found = results[side]
        theirs = speed_of(workload, found)
        same_length = found.get("tokens", workload.seq_len) == workload.seq_len
        if own and theirs and same_length:
            print(f"{name}: {own / theirs:.2f} times the speed of {side}", flush=True)
