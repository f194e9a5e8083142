"""A rank of a job of multi_gpu.py: joins the process group, then runs the plan's cases one after the other."""

from __future__ import annotations

import faulthandler
import os
import signal
import time
import traceback
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import multi_equality
import multi_links
import multi_throughput
from fourfold.parallel.mesh import Mesh, build_mesh, local_device, single, start_process_group, stop_process_group
from fourfold.parallel.whole import everyone
from fourfold.planning.layout import Layout
from fourfold.training.host_speed import host_op_seconds
from multi_job import CURRENT, Plan, read, write
from multi_layouts import LAYOUTS, parse, reference_of
from multi_predict import predict
from multi_results import Results, is_failure, line_of
from multi_speeds import SPEEDS

_TIMEOUT_S = 600
_FAILED = 3


class Meshes:
    """The mesh of each layout, made once: what torch has cached of one that is gone would name wrong groups."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._made: dict[tuple[int, ...], Mesh] = {}

    def of(self, layout: Layout) -> Mesh:
        """The mesh of a layout; every rank of the job must ask in the same order."""
        sizes = tuple(layout.sizes().values())
        known = self._made.get(sizes)
        if known is None:
            known = self._made[sizes] = build_mesh(layout, self.device)
        return Mesh(layout, self.device, known.device_mesh, known.expert_mesh, known.fsdp_mesh)


def work(plan_file: Path) -> None:
    """The part of one rank."""
    plan = Plan(**read(plan_file))
    folder, rank = Path(plan.work), int(os.environ["RANK"])
    warnings.simplefilter("ignore")
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    try:
        device = local_device(use_cpu=plan.is_tiny)
        start_process_group(device, _TIMEOUT_S)
        results, meshes = Results(Path(plan.results)), Meshes(device)
        for name in plan.cases:
            if everyone(time.time())[0] + plan.seconds[name] > plan.deadline:
                continue
            if rank == 0:
                write(folder / CURRENT, {"case": name, "since": time.time()})
            started = time.perf_counter()
            row = run_case(name, meshes, plan, results)
            row["seconds"] = time.perf_counter() - started
            if rank == 0:
                results.put(name, row, plan.call)
                print(line_of(name, row), flush=True)
                (folder / CURRENT).unlink()
        everyone(None)
        stop_process_group()
    except BaseException as error:
        kind = "out_of_memory" if isinstance(error, torch.OutOfMemoryError) else "error"
        text = traceback.format_exc()[-3000:] if kind == "error" else str(error)[:600]
        found = {"kind": kind, "rank": rank, "at": time.time(), "text": text}
        write(folder / f"failed-{rank}.json", found)
        os._exit(_FAILED)  # threads of a broken collective would keep the interpreter from ending


def run_case(name: str, meshes: Meshes, plan: Plan, results: Results) -> dict[str, Any]:
    """A case on this rank of a job; all ranks call, and all get its row."""
    kind, folder, tiny = name.split("/", 1)[0], Path(plan.work), plan.is_tiny
    if kind == "links":
        return _links(meshes.device, results, is_tiny=tiny)
    if kind == "equality":
        _, layout = parse(name)
        reference = _reference(name, meshes, plan, results)
        mesh = meshes.of(LAYOUTS[layout])
        return multi_equality.run_case(name, reference, folder, mesh, is_tiny=tiny)
    return _throughput(name, meshes, plan, results)


def _throughput(name: str, meshes: Meshes, plan: Plan, results: Results) -> dict[str, Any]:
    is_tiny, folder = plan.is_tiny, Path(plan.work)
    case, found, rank = SPEEDS[name.split("/")[2]], None, dist.get_rank()
    point = multi_throughput.point_of(case, folder, rank, is_tiny=is_tiny)
    alone = case.ranks == 1  # the others wait
    mesh = single(meshes.device) if alone else meshes.of(point.layout)
    if not alone or rank == 0:
        trace = results.file.parent / f"{name.replace('/', '-')}.trace.json.gz" if plan.is_profiled else None
        found = multi_throughput.run_case(case, point, mesh, trace)
    row = multi_throughput.merge_ranks(everyone(found))
    row |= {"fields": asdict(point), "note": case.note, "is_tiny": is_tiny}
    return row | predict(row, _gpu_name(meshes.device), results.rows().get(f"links/{dist.get_world_size()}"))


def _reference(name: str, meshes: Meshes, plan: Plan, results: Results) -> dict[str, Any]:
    """What one GPU did, from the results or found now."""
    wanted = reference_of(name)
    known = everyone(results.rows().get(wanted))[0]
    if known is not None and not is_failure(known):
        return known
    alone, rank = single(meshes.device), dist.get_rank()
    row = multi_equality.run_reference(name, Path(plan.work), alone, rank, is_tiny=plan.is_tiny)
    if rank == 0:
        results.put(wanted, row, plan.call)
    return row


def _links(device: torch.device, results: Results, *, is_tiny: bool) -> dict[str, Any]:
    row = multi_links.run_case(device, is_tiny=is_tiny)
    host_op_us = 1e6 * host_op_seconds(device) if device.type == "cuda" else None
    if dist.get_rank() == 0:
        print(multi_links.table(row), flush=True)
        text = multi_links.hardware_file(row, _gpu_name(device), host_op_us)
        (results.file.parent / f"hardware-{row['ranks']}.yaml").write_text(text, encoding="utf-8")
    return {**row, "host_op_us": host_op_us}


def _gpu_name(device: torch.device) -> str | None:
    """The GPU's name; None without one."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None
