"""The hardware that a plan is for: named on the command line, described in a file, or this machine's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from fourfold.base.errors import ConfigError, PlanError

if TYPE_CHECKING:
    from fourfold.planning.hardware import Cluster

Gpu = Annotated[
    str | None, typer.Option("--gpu", metavar="NAME", help="GPU to plan for, e.g. h100; default: this machine's.")
]
Gpus = Annotated[int | None, typer.Option("--gpus", metavar="N", help="GPUs of a node.")]
Nodes = Annotated[int | None, typer.Option("--nodes", metavar="M", help="Nodes; default: 1.")]
HardwareFile = Annotated[
    str | None, typer.Option("--hardware", metavar="FILE.yaml", help="File that describes GPUs and links instead.")
]


def cluster_of(
    gpu: str | None, gpus: int | None, nodes: int | None, hardware: str | None, *, nproc: int | None = None
) -> Cluster:
    """The cluster that the flags of a command line ask for.

    Args:
        nproc: processes that the config asks for on this machine, where no flag says how many GPUs.
    Raises:
        ConfigError: flags that contradict each other.
        PlanError: no such GPU, a bad file, or no flags on a machine without a GPU.
    """
    from fourfold.planning.detect import detect
    from fourfold.planning.hardware import build_cluster
    from fourfold.planning.hardware_file import read_hardware

    named = {"--gpu": gpu, "--gpus": gpus, "--nodes": nodes}
    given = [name for name, value in named.items() if value is not None]
    if hardware is not None:
        if given:
            raise ConfigError(
                f"hardware: {hardware} and {', '.join(given)} contradict each other. Keep one of the two."
            )
        return read_hardware(hardware)
    for name in ("--gpus", "--nodes"):
        value = named[name]
        if isinstance(value, int) and value < 1:
            raise PlanError(f"{name[2:]}: {value} is out of range. Use a whole number of at least 1.")
    if gpu is not None:
        return build_cluster(gpu, gpus or 1, nodes or 1)
    found = detect()
    if found is None:
        raise PlanError(
            "gpu: this machine has none that a driver tells of. Name what to plan for, e.g. --gpu h100 --gpus 8 "
            "--nodes 2, or --hardware FILE.yaml."
        )
    return build_cluster(found.device, gpus or nproc or found.per_node, nodes or 1, notes=found.notes)
