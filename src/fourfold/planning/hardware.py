"""Devices and how they are joined: looking one up by name, clusters of them, and the link a group of ranks has.

Node networks are named by what a node sends in one direction, e.g. `3.2T` for eight ports of 400 Gbit/s. Without one,
a node has its card's usual ports (400 Gbit/s for each H100, H200, B200, GB200 or MI300X, 200 for an A100, 50 for a
V100), and 100 Gbit/s at least.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from fourfold.base import registry
from fourfold.base.errors import PlanError
from fourfold.planning.catalogue import ALIASES, ASSUMED, DEVICES, link_of
from fourfold.planning.device import Device, Link

NODE_LINKS: dict[str, float] = {"100G": 100, "200G": 200, "400G": 400, "800G": 800, "1.6T": 1600, "3.2T": 3200}
"""Name of a node's network -> Gbit/s of the whole node in one direction."""

_NOISE = {"nvidia", "amd", "instinct", "geforce", "tesla", "rtx", "gpu", "gb", "oam", "vf"}
_NOISE_PATTERN = re.compile(r"sxm\d?|hbm\d?e?")
_LEAST_NODE_GBIT = 100.0


def find_device(name: str) -> Device:
    """The device of a name: a key of the catalogue, a driver's name or a common spelling.

    `h100`, `H100 SXM`, `NVIDIA H100 80GB HBM3` and `nvidia-h100` are the same. Where a name leaves the memory open the
    larger card is taken, and the device's note says so.

    Raises:
        PlanError: no such device; names the nearest ones, then all.
    """
    words = _words(name)
    for spelling, key in (*((key, key) for key in DEVICES), *ALIASES.items()):
        if set(_words(spelling)) == set(words):
            assumed = ASSUMED.get("-".join(words))
            return DEVICES[key].with_note(assumed) if assumed else DEVICES[key]
    raise PlanError(_unknown(name))


def nearest_device(name: str) -> Device | None:
    """The slowest of the devices that share a name's first word (`h100`), or else are spelled much like it.

    None if there is none.
    """
    first = _words(name)[:1]
    same = [key for key in DEVICES if _words(key)[:1] == first]
    close = [DEVICES[key] for key in same or _nearest_keys(name)]
    return min(close, key=lambda device: device.peak(device.best_half), default=None)


def _nearest_keys(name: str) -> list[str]:
    close = registry.nearest("-".join(_words(name)), [*DEVICES, *ALIASES])
    return list(dict.fromkeys(ALIASES.get(entry, entry) for entry in close))


def _words(name: str) -> list[str]:
    """What a name tells of the card: no maker, form factor or memory type, and sizes without unit."""
    spread = re.sub(r"\brtx(?=\d)", "", re.sub(r"[^a-z0-9.]+", " ", name.lower()))
    words = [re.sub(r"^(\d+)(gb|g)$", r"\1", word) for word in spread.split()]
    return [word for word in words if word not in _NOISE and not _NOISE_PATTERN.fullmatch(word)]


def _unknown(name: str) -> str:
    keys = _nearest_keys(name)
    hint = f" Did you mean {' or '.join(keys)}?" if keys else ""
    options = ", ".join(sorted(DEVICES))
    return f"gpu: {name!r} is not known.{hint} Use one of: {options}; or give its figures with --hardware FILE.yaml."


@dataclass(frozen=True, slots=True)
class Cluster:
    """Equal nodes of equal devices. Ranks are numbered node by node.

    Attributes:
        device: every GPU.
        per_node: GPUs of a node.
        nodes: how many.
        node_link: of a whole node to the others, in one direction; its latency is that of one hop.
        notes: what was assumed or is unusual, for people.
    """

    device: Device
    per_node: int
    nodes: int
    node_link: Link
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if min(self.per_node, self.nodes) < 1:
            raise PlanError(f"gpus: {self.nodes} nodes of {self.per_node} GPUs are no cluster. Use at least 1 of each.")

    @property
    def world_size(self) -> int:
        """GPUs in all."""
        return self.per_node * self.nodes

    @property
    def domain(self) -> int:
        """Consecutive ranks that the device's own link joins: a node, part of one, or a rack."""
        within = self.world_size if self.device.link_leaves_node else self.per_node
        return min(within, self.device.link_domain)

    def is_local(self, size: int, stride: int = 1) -> bool:
        """Whether groups of `size` ranks, `stride` apart, each stay within a domain.

        The groups tile the world in blocks of size x stride ranks, so they stay if whole blocks fill a domain.
        """
        return size == 1 or self.domain == self.world_size or self.domain % (size * stride) == 0

    def link(self, size: int, stride: int = 1, *, all_to_all: bool = False) -> Link:
        """The link of a rank with its group, while every other group of the same kind sends as well.

        Within a domain it is the device's link. A group that crosses is limited by its domain's share of the network:
        in a ring, and in a chain of pipeline stages, one hop of each group crosses, and min(stride, domain) groups do
        so at once; in an all-to-all every rank of the domain sends across.

        Args:
            size: ranks of a group.
            stride: distance of neighbouring ranks of the group (1 for the innermost axis of the mesh).
            all_to_all: every rank sends to every other (experts), instead of to its neighbour.
        Returns:
            bytes_per_s of one GPU in one direction, at most the device's link, and the latency of the slowest hop.
        """
        own = self.device.link
        if self.is_local(size, stride):
            return own
        sharing = self.domain if all_to_all else min(stride, self.domain)
        network = self.node_link.bytes_per_s * self.domain / self.per_node
        return Link("network", min(own.bytes_per_s, network / sharing), self.node_link.latency_s)

    def describe(self) -> str:
        """E.g. `2 nodes of 8 x NVIDIA H200 SXM 141GB, 3.2 Tbit/s between nodes`."""
        gpus = f"{self.per_node} x {self.device.title}"
        if self.nodes == 1:
            return gpus
        gbit = self.node_link.bytes_per_s * 8 / 1e9
        rate = f"{gbit / 1000:g} Tbit/s" if gbit >= 1000 else f"{gbit:g} Gbit/s"
        return f"{self.nodes} nodes of {gpus}, {rate} between nodes"


def build_cluster(
    gpu: Device | str, gpus: int = 1, nodes: int = 1, node_link: str | float | None = None, notes: tuple[str, ...] = ()
) -> Cluster:
    """A cluster from what a user says.

    Args:
        gpu: a device or its name.
        gpus: GPUs of one node.
        nodes: how many.
        node_link: name (`400G`) or Gbit/s of a whole node; None for what is usual with this device.
    Raises:
        PlanError: no such device or network, or no GPU at all.
    """
    device = find_device(gpu) if isinstance(gpu, str) else gpu
    network = default_node_link(device, gpus) if node_link is None else parse_node_link(node_link)
    own = (device.note,) if device.note else ()
    return Cluster(device, gpus, nodes, network, (*own, *notes))


def default_node_link(device: Device, gpus: int) -> Link:
    """The usual network of a node with so many of these GPUs."""
    return parse_node_link(max(_LEAST_NODE_GBIT, device.nic_gbit_per_s * gpus))


def parse_node_link(value: str | float) -> Link:
    """A node's network from its name (`400G`, `3.2T`) or from Gbit/s.

    Raises:
        PlanError: neither; lists the names.
    """
    if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
        return link_of("network", value * 1e9 / 8)
    gbit = NODE_LINKS.get(str(value).upper())
    if gbit is None:
        options = ", ".join(NODE_LINKS)
        raise PlanError(f"node_link: {value!r} is not known. Use {options} (of a whole node) or a number of Gbit/s.")
    return link_of("network", gbit * 1e9 / 8)
