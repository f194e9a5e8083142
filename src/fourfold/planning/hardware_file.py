"""Hardware that a user describes in a file (`--hardware FILE.yaml`): a card of the catalogue, changed, or a new one.

gpu: h100            # or none, with memory_gib, flops, hbm_gb_s and link_gb_s
gpus: 8              # of a node
nodes: 4
node_link: 1.6T      # of a node, or Gbit/s
memory_gib: 79.1
flops: {bf16: 989e12, fp32: 67e12}
hbm_gb_s: 3352
link: nvlink
link_gb_s: 450       # of a GPU, in one direction
link_domain: 8
host_op_us: 3.5      # what the host takes to launch one small operator
calibration: h100.json
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from fourfold.base import registry
from fourfold.base.errors import PlanError
from fourfold.config.yaml12 import parse_yaml
from fourfold.planning.catalogue import DEVICES, link_of
from fourfold.planning.device import DTYPES, Curve, Device
from fourfold.planning.hardware import Cluster, build_cluster, find_device, parse_node_link

_LEAST_FLOPS = 1e10
_FASTEST_PCIE_GB_S = 64  # generation 5
_KINDS = ("nvlink", "xgmi", "pcie")
_MEASURED = ("efficiency", "hbm_gb_s")
_NEEDED = ("memory_gib", "flops", "hbm_gb_s", "link_gb_s")


def read_hardware(path: str | Path) -> Cluster:
    """The cluster that a file describes.

    Raises:
        PlanError: the file cannot be read, or has unknown keys, values or too few of them; all at once.
    """
    values = _mapping(Path(path))
    problems = [f"{path}: {problem}" for problem in _problems(values)]
    if problems:
        raise PlanError("\n".join(problems))
    device = _device(values)
    if "calibration" in values:
        device = read_calibration(Path(path).parent / values["calibration"], device)
    return build_cluster(device, values.get("gpus", 1), values.get("nodes", 1), values.get("node_link"))


def read_calibration(path: str | Path, device: Device) -> Device:
    """The device with measured figures instead of the catalogue's.

    The file is a mapping, JSON or YAML: `efficiency` (dtype -> list of [FLOPs of a product, attained share of the
    dense peak]) and `hbm_gb_s`, both optional.

    Raises:
        PlanError: it cannot be read, or is not of this form; all problems at once.
    """
    values = _mapping(Path(path))
    curves = values.get("efficiency", {})
    problems = [
        _unknown_key(key, ("efficiency", "hbm_gb_s")) for key in values if key not in ("efficiency", "hbm_gb_s")
    ]
    if not isinstance(curves, dict):
        problems.append("efficiency: is not a mapping of dtypes. Use e.g. bf16: [[1e9, 0.1], [1e12, 0.8]].")
        curves = {}
    for dtype, points in curves.items():
        if dtype not in device.dense:
            problems.append(f"efficiency: {device.title} has no {dtype!r}. Use {', '.join(device.dense)}.")
        elif not _is_curve(points):
            problems.append(f"efficiency.{dtype}: is not a list of [FLOPs, share], FLOPs rising and shares above 0.")
    if "hbm_gb_s" in values and not _is_positive(values["hbm_gb_s"]):
        problems.append(f"hbm_gb_s: {values['hbm_gb_s']!r} is not valid. Use a number above 0.")
    if problems:
        raise PlanError("\n".join(f"{path}: {problem}" for problem in problems))
    measured: dict[str, Curve] = {
        dtype: tuple((float(flops), float(share)) for flops, share in points) for dtype, points in curves.items()
    }
    hbm = values["hbm_gb_s"] * 1e9 if "hbm_gb_s" in values else device.hbm_bytes_per_s
    # measured curves first: a dtype without its own takes the first
    efficiency = {**measured, **{dtype: curve for dtype, curve in device.efficiency.items() if dtype not in measured}}
    return replace(device, efficiency=efficiency, hbm_bytes_per_s=hbm)


def _mapping(path: Path) -> dict[str, Any]:
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"{path}: cannot be read ({error}).") from error
    except yaml.YAMLError as error:
        raise PlanError(f"{path}: is not YAML. {error}") from error
    if not isinstance(values, dict):
        raise PlanError(f"{path}: is not a mapping. Use lines such as `gpu: h100`.")
    return {str(key): value for key, value in values.items()}


def _problems(values: dict[str, Any]) -> list[str]:
    """What is wrong with a hardware file, one line each."""
    problems = [_unknown_key(key, tuple(_CHECKS)) for key in values if key not in _CHECKS]
    for key, (valid, wanted) in _CHECKS.items():
        if key in values and not valid(values[key]):
            problems.append(f"{key}: {values[key]!r} is not valid. Use {wanted}.")
    if "flops" in values and isinstance(values["flops"], dict):
        problems += _flops_problems(values["flops"])
    if isinstance(values.get("gpu"), str):
        try:
            find_device(values["gpu"])
        except PlanError as error:
            problems.append(str(error))
    missing = [key for key in _NEEDED if key not in values]
    if "gpu" not in values and missing:
        problems.append(
            f"gpu: is not given, and {', '.join(missing)} neither. Give gpu, or all of {', '.join(_NEEDED)}."
        )
    return problems


def _flops_problems(flops: dict[Any, Any]) -> list[str]:
    problems = []
    for dtype, value in flops.items():
        if dtype not in DTYPES:
            problems.append(registry.unknown("flops", str(dtype), DTYPES))
        elif not _is_positive(value):
            problems.append(f"flops.{dtype}: {value!r} is not valid. Use a number above 0, in FLOP/s.")
        elif value < _LEAST_FLOPS:
            problems.append(f"flops.{dtype}: {value!r} FLOP/s is too slow for a GPU. Write {value:g}e12 for TFLOP/s.")
    if not {"bf16", "fp16"} & set(flops):
        problems.append("flops: has neither bf16 nor fp16. Give one of them.")
    return problems


def _unknown_key(key: str, valid: tuple[str, ...]) -> str:
    close = registry.nearest(key, valid)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    return f"{key}: there is no such key.{hint} Use {', '.join(valid)}."


def _device(values: dict[str, Any]) -> Device:
    """The device of valid values."""
    title = values.get("title")
    device = find_device(values["gpu"]) if "gpu" in values else _custom(values)
    if title:
        device = replace(device, title=title)
    if "memory_gib" in values:
        device = replace(device, memory_gib=float(values["memory_gib"]))
    if "flops" in values and "gpu" in values:
        device = replace(device, dense={**device.dense, **values["flops"]})
    if "hbm_gb_s" in values:
        device = replace(device, hbm_bytes_per_s=values["hbm_gb_s"] * 1e9)
    if "link" in values or "link_gb_s" in values:
        rate = values["link_gb_s"] * 1e9 if "link_gb_s" in values else device.link.bytes_per_s
        device = replace(device, link=link_of(values.get("link", device.link.kind), rate))
    if "link_domain" in values:
        device = replace(device, link_domain=values["link_domain"])
    if "host_op_us" in values:
        device = replace(device, host_op_s=values["host_op_us"] * 1e-6)
    return device


def _custom(values: dict[str, Any]) -> Device:
    """A device that no entry of the catalogue describes; its curve is Hopper's, stretched to its peak."""
    like, dense = DEVICES["h100"], values["flops"]
    half = "bf16" if "bf16" in dense else "fp16"
    scale = dense[half] / like.dense["bf16"]
    fast = values["link_gb_s"] > _FASTEST_PCIE_GB_S
    return replace(
        like,
        name="custom",
        title="custom GPU",
        dense=dense,
        link=link_of("nvlink" if fast else "pcie", values["link_gb_s"] * 1e9),
        nic_gbit_per_s=like.nic_gbit_per_s if fast else DEVICES["l4"].nic_gbit_per_s,
        efficiency={half: tuple((flops * scale, share) for flops, share in like.efficiency["bf16"])},
        source="hardware file",
    )


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_node_link(value: Any) -> bool:
    try:
        parse_node_link(value)
    except PlanError:
        return False
    return True


def _is_curve(points: Any) -> bool:
    if not isinstance(points, list) or not points:
        return False
    if not all(isinstance(p, list) and len(p) == 2 and _is_positive(p[0]) and _is_positive(p[1]) for p in points):
        return False
    return all(low[0] < high[0] for low, high in itertools.pairwise(points))


_POSITIVE = (_is_positive, "a number above 0")
_COUNT = (_is_count, "a whole number of at least 1")
_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "gpu": (_is_text, "a name, e.g. h100"),
    "title": (_is_text, "a name for people"),
    "gpus": _COUNT,
    "nodes": _COUNT,
    "node_link": (_is_node_link, "100G, 200G, 400G, 800G, 1.6T, 3.2T or Gbit/s, of a whole node"),
    "memory_gib": _POSITIVE,
    "flops": (lambda value: isinstance(value, dict) and bool(value), "dtypes with FLOP/s, e.g. {bf16: 989e12}"),
    "hbm_gb_s": _POSITIVE,
    "link": (lambda value: value in _KINDS, "nvlink, xgmi or pcie"),
    "link_gb_s": _POSITIVE,
    "link_domain": _COUNT,
    "host_op_us": _POSITIVE,
    "calibration": (_is_text, "the path of a file of measured figures"),
}
