"""`fourfold rehearse`: one rank of the planned job on this machine, measured beside what was predicted."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from fourfold.cli.hardware import Gpu, Gpus, HardwareFile, Nodes, cluster_of
from fourfold.cli.plan import plan_run, read_run
from fourfold.cli.session import Words, clear_errors

Rank = Annotated[int | None, typer.Option("--rank", metavar="R", min=0, help="Rank to run; default: the most loaded.")]
Ranks = Annotated[str | None, typer.Option("--ranks", metavar="R,R", help="Several of them: numbers, first, last.")]
Steps = Annotated[int, typer.Option("--steps", metavar="N", min=2, help="Steps to run.")]
Fake = Annotated[bool, typer.Option("--fake", help="Tensors without numbers: needs no GPU and hardly any memory.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def rehearse(
    words: Words = None,
    gpu: Gpu = None,
    gpus: Gpus = None,
    nodes: Nodes = None,
    hardware: HardwareFile = None,
    rank: Rank = None,
    ranks: Ranks = None,
    steps: Steps = 3,
    fake: Fake = False,
    as_json: AsJson = False,
) -> None:
    """Run one rank of the planned job here, without its partners."""
    with clear_errors():
        run = read_run("rehearse", words)
        cluster = cluster_of(gpu, gpus, nodes, hardware, nproc=run.parallel.nproc)
        plan = plan_run(run, cluster, eager=True)  # which is how it is rehearsed
        from fourfold.training.dry_run import as_text, rehearse_plan
        from fourfold.training.rehearse import left_out

        wanted = [*([str(rank)] if rank is not None else []), *(ranks.split(",") if ranks else [])]
        found = rehearse_plan(run, plan, wanted, fake=fake, steps=steps)
        if as_json:
            assert plan.best is not None
            ranks_found = [one.as_json() for one in found]
            print(json.dumps({"best": plan.best.as_json(), "notes": [*left_out(run)], "ranks": ranks_found}, indent=2))
        else:
            print(as_text(run, plan, found, fake=fake))
