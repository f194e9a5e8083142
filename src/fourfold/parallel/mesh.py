"""The only DeviceMesh, built from a layout, and what a rank must know of its place in it."""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fourfold.base.errors import MemoryExhaustedError
from fourfold.planning.axes import AXES
from fourfold.planning.layout import Layout
from fourfold.planning.stages import pipelines

_NAMES = tuple(axis.name for axis in AXES)
_FSDP_NAMES = tuple(name for name in _NAMES if name != "cp")
_EXPERT_NAMES = ("pp", "dp_replicate", "dp_shard", "ep", "tp")


@dataclass(frozen=True)
class Mesh:
    """The ranks of a job, arranged by axes.

    Derived views: `dp` = dp_replicate x dp_shard (ranks with different samples), `fsdp` = dp_shard x cp (ranks over
    which weights are sharded), `loss` = dp x cp (ranks whose losses add up).

    Attributes:
        device_mesh: axes named and ordered as in planning.axes; None for one process without a process group.
        expert_mesh: the same ranks, those of dp_shard x cp regrouped: [pp, dp_replicate, dp_shard, ep, tp], where
            dp_shard is what is left of them; None without expert parallelism.
        fsdp_mesh: the same ranks as FSDP sees them: [pp, dp_replicate, dp_shard, tp], where dp_shard is dp_shard x cp;
            None without context parallelism.
    """

    layout: Layout
    device: torch.device
    device_mesh: DeviceMesh | None = None
    expert_mesh: DeviceMesh | None = None
    fsdp_mesh: DeviceMesh | None = None

    @property
    def rank(self) -> int:
        """This rank of the whole job."""
        return 0 if self.device_mesh is None else dist.get_rank()

    def wait(self) -> None:
        """Until every rank is here; on the host, so that no GPU is held."""
        if self.device_mesh is not None:
            dist.all_reduce(torch.zeros(1))  # a host tensor goes by gloo, whatever the device

    def index(self, axis: str) -> int:
        """This rank's place on one axis."""
        return 0 if self.device_mesh is None else self.device_mesh[axis].get_local_rank()

    def size(self, axis: str) -> int:
        """Ranks on one axis."""
        return int(getattr(self.layout, axis))

    @property
    def dp_rank(self) -> int:
        """This rank's place among the data-parallel ranks, in the order of samples."""
        return self.index("dp_replicate") * self.layout.dp_shard + self.index("dp_shard")

    def view(self, axes: Sequence[str]) -> DeviceMesh:
        """The sub-mesh of some axes, in the order of the table."""
        assert self.device_mesh is not None, "one process has no mesh"
        return self.device_mesh[tuple(axes)]

    def sharding(self, axes: Sequence[str]) -> DeviceMesh:
        """The same over which FSDP shards weights: its `dp_shard` is dp_shard x cp."""
        mesh = self.fsdp_mesh or self.device_mesh
        assert mesh is not None, "one process has no mesh"
        return mesh[tuple(axes)]

    def group(self, axes: Sequence[str]) -> dist.ProcessGroup | None:
        """The process group over some axes; None where they have a single rank."""
        size = 1
        for axis in axes:
            size *= getattr(self.layout, axis)
        if size == 1 or self.device_mesh is None:
            return None
        if len(axes) == 1:
            return self.device_mesh.get_group(axes[0])
        return self.device_mesh[tuple(axes)]._flatten("_".join(axes)).get_group()

    def new_pipeline_group(self, places: Sequence[int], *, at_once: bool = False) -> dist.ProcessGroup | None:
        """A further group of some ranks of this rank's pipeline, None if it is none of them; every rank of the job must
        call, and all make the groups of all pipelines.

        Args:
            places: in the pipeline.
            at_once: set it up now on a GPU, by all of its ranks, not by its first use.
        """
        mine = None
        for ranks in pipelines(self.layout):
            chosen = [ranks[place] for place in places]
            group = dist.new_group(chosen, device_id=self.device if at_once and self.device.type == "cuda" else None)
            if self.rank in chosen:
                assert isinstance(group, dist.ProcessGroup)
                mine = group
        return mine


def single(device: torch.device) -> Mesh:
    """One process."""
    return Mesh(Layout(), device)


def build_mesh(layout: Layout, device: torch.device) -> Mesh:
    """The mesh of a layout over the initialised process group."""
    sizes = tuple(getattr(layout, name) for name in _NAMES)
    experts = None
    if layout.ep > 1:
        left = layout.dp_shard * layout.cp // layout.ep
        regrouped = (layout.pp, layout.dp_replicate, left, layout.ep, layout.tp)
        experts = init_device_mesh(device.type, regrouped, mesh_dim_names=_EXPERT_NAMES)
    fsdp = None
    if layout.cp > 1:
        # The two are neighbours in the order of ranks. Flattening them would do if torch let the result be sliced.
        merged = (layout.pp, layout.dp_replicate, layout.dp_shard * layout.cp, layout.tp)
        fsdp = init_device_mesh(device.type, merged, mesh_dim_names=_FSDP_NAMES)
    return Mesh(layout, device, init_device_mesh(device.type, sizes, mesh_dim_names=_NAMES), experts, fsdp)


def start_process_group(device: torch.device, timeout_s: int) -> None:
    """Join the job that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe.

    Raises:
        MemoryExhaustedError: the device is full before anything has begun.
    """
    if device.type == "cuda":
        try:
            torch.cuda.set_device(device)
        except RuntimeError as error:
            if "out of memory" not in str(error):
                raise
            raise MemoryExhaustedError(
                f"{device} has no memory left to begin with: other processes hold it (nvidia-smi shows which). End "
                "them, or choose other GPUs with CUDA_VISIBLE_DEVICES."
            ) from error
    else:
        # Processes share the cores; a forked one must also not go on with the thread pool of its parent.
        share = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", max(share, 1))))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        timeout=datetime.timedelta(seconds=timeout_s),
        device_id=device if device.type == "cuda" else None,
    )


def stop_process_group() -> None:
    """Leave the job."""
    dist.destroy_process_group()


def local_device(use_cpu: bool) -> torch.device:
    """This process's device: the CUDA device of its LOCAL_RANK, or the CPU."""
    if torch.cuda.is_available() and not use_cpu:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


@lru_cache(maxsize=64)
def is_ampere_or_later(number: int) -> bool:
    """Whether a CUDA device has compute capability 8 or more; one that is only imagined does."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(number)[0] >= 8
