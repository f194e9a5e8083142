"""What the planner knows of an accelerator: memory, speed by dtype, memory bandwidth and its link to its neighbours.

Plain numbers without torch. The figures themselves are in `catalogue.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from fourfold.base.errors import PlanError
from fourfold.base.units import GIB

HOST_OP_S = 3.5e-6
"""Of an ordinary server's host; a virtual machine may take three times as long (9.5e-6 beside an H100)."""

LINK_SHARE = 0.8
"""Of a link's rate, what collectives of NCCL attain for large messages where nothing else was measured: 360 of 450 GB/s
on 8 H100 (nccl-tests)."""

DTYPES = ("fp32", "tf32", "bf16", "fp16", "fp8")

LinkKind = Literal["nvlink", "xgmi", "pcie", "network"]

Curve = tuple[tuple[float, float], ...]
"""Points (FLOPs of one product, attained share of the dense peak), in rising order of FLOPs."""


@dataclass(frozen=True, slots=True)
class Link:
    """What ranks send each other over.

    Attributes:
        kind: `nvlink`, `xgmi` (AMD Infinity Fabric), `pcie`, or `network` between nodes.
        bytes_per_s: of one GPU, in one direction, both directions at once.
        latency_s: of one hop of a ring; a ring all-gather over n ranks waits (n - 1) of them.
        share: of `bytes_per_s`, what collectives attain for large messages.
    """

    kind: LinkKind
    bytes_per_s: float
    latency_s: float
    share: float = LINK_SHARE

    @property
    def attained_bytes_per_s(self) -> float:
        """Of a collective of large messages."""
        return self.bytes_per_s * self.share


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator.

    Attributes:
        name: key in the catalogue, e.g. `h100`.
        title: for people, e.g. `NVIDIA H100 SXM 80GB`.
        memory_gib: what a process may use at most, GiB: torch's `total_memory`, which is less than the driver's
            total by what driver and firmware keep.
        dense: dtype -> peak FLOP/s of matrix products without sparsity; a dtype that the card lacks is absent.
        hbm_bytes_per_s: peak of the device memory, reads and writes together.
        link: to the other GPUs of its domain.
        link_domain: most GPUs that share this link.
        link_leaves_node: the domain spans nodes (a rack of GB200), instead of ending with the node.
        nic_gbit_per_s: usual network of a node for each of its GPUs, Gbit/s in one direction.
        efficiency: dtype -> attained share of `dense` by size of the product; at least one.
        source: where the figures are from.
        host_op_s: what the host takes to launch one small operator in eager mode (`x.add_(1)`), seconds.
        note: what was assumed, if anything; for people.
    """

    name: str
    title: str
    memory_gib: float
    dense: Mapping[str, float] = field(hash=False)
    hbm_bytes_per_s: float
    link: Link
    link_domain: int
    nic_gbit_per_s: float
    efficiency: Mapping[str, Curve] = field(hash=False)
    source: str
    link_leaves_node: bool = False
    host_op_s: float = HOST_OP_S
    note: str = ""

    @property
    def memory_bytes(self) -> int:
        """Usable memory in bytes."""
        return int(self.memory_gib * GIB)

    @property
    def best_half(self) -> str:
        """The 16-bit dtype to compute in: bf16 where the card has it, else fp16."""
        return "bf16" if "bf16" in self.dense else "fp16"

    def peak(self, dtype: str) -> float:
        """Dense peak FLOP/s of a dtype.

        Raises:
            PlanError: the card has no such dtype.
        """
        if dtype not in self.dense:
            raise PlanError(f"dtype: {self.title} has no {dtype}. Use {' or '.join(self.dense)}.")
        return self.dense[dtype]

    def matmul_efficiency(self, flops_of_product: float, dtype: str) -> float:
        """Attained share of the dense peak for one matrix product of so many FLOPs (2 m n k).

        Linear between the points of the curve in log10(FLOPs), constant above the last. Below the first point a
        product takes as long as there (its launch), so the share falls with the FLOPs. A dtype without a curve of
        its own takes the one that is there, at the FLOPs that would take the same time at peak speed.

        Raises:
            PlanError: the card has no such dtype.
        """
        peak = self.peak(dtype)
        curve = self.efficiency.get(dtype)
        if curve is None:
            known, curve = next(iter(self.efficiency.items()))
            flops_of_product *= self.dense[known] / peak
        return share_at(curve, flops_of_product)

    def matmul_seconds(self, flops_of_product: float, dtype: str) -> float:
        """Time of one matrix product that memory bandwidth does not limit; seconds."""
        return flops_of_product / (self.peak(dtype) * self.matmul_efficiency(flops_of_product, dtype))

    def with_note(self, note: str) -> Device:
        """The same device with something more to tell."""
        return replace(self, note=f"{self.note} {note}".strip())


def share_at(curve: Curve, flops: float) -> float:
    """A curve's value at so many FLOPs; see `Device.matmul_efficiency`."""
    first, last = curve[0], curve[-1]
    if flops <= first[0]:
        return first[1] * max(flops, 1.0) / first[0]
    if flops >= last[0]:
        return last[1]
    index = next(i for i, point in enumerate(curve) if point[0] >= flops)
    (low, share), (high, next_share) = curve[index - 1], curve[index]
    part = math.log10(flops / low) / math.log10(high / low)
    return share + part * (next_share - share)
