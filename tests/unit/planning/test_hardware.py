"""Looking up devices, their figures, and the link that a group of ranks has."""

from __future__ import annotations

import itertools
import math

import pytest

from fourfold.base.errors import PlanError
from fourfold.planning.catalogue import ALIASES, ASSUMED, DEVICES
from fourfold.planning.device import DTYPES, share_at
from fourfold.planning.hardware import (
    NODE_LINKS,
    build_cluster,
    default_node_link,
    find_device,
    nearest_device,
    parse_node_link,
)

LISTED = (
    *("v100", "v100-16", "t4", "a10", "a100-40", "a100-80", "l4", "l40s", "rtx3090", "rtx4090", "rtx5090"),
    *("h100", "h100-pcie", "h200", "b200", "gb200", "mi300x"),
)


@pytest.mark.parametrize("name", LISTED)
def test_find_device_when_listed_is_found(name: str) -> None:
    assert find_device(name).name == name


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("H100 SXM", "h100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("H100-SXM5-80GB", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A100 80GB PCIe", "a100-80-pcie"),
        ("NVIDIA A100-PCIE-40GB", "a100-40-pcie"),
        ("Tesla V100-SXM2-16GB", "v100-16"),
        ("Tesla V100-SXM2-32GB", "v100"),
        ("Tesla V100-PCIE-32GB", "v100-pcie"),
        ("Tesla T4", "t4"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("4090", "rtx4090"),
        ("RTX3090", "rtx3090"),
        ("rtx 5090 32g", "rtx5090"),
        ("AMD Instinct MI300X", "mi300x"),
        ("GB200 NVL72", "gb200"),
    ],
)
def test_find_device_when_spelled_otherwise_is_the_same(name: str, key: str) -> None:
    assert find_device(name).name == key


@pytest.mark.parametrize(("name", "key", "other"), [("a100", "a100-80", "a100-40"), ("V100", "v100", "v100-16")])
def test_find_device_when_memory_is_open_says_what_it_took(name: str, key: str, other: str) -> None:
    found = find_device(name)
    assert found.name == key
    assert other in found.note
    assert build_cluster(found, 8).notes == (found.note,)


def test_find_device_when_unknown_names_the_nearest() -> None:
    with pytest.raises(PlanError, match=r"gpu: 'h10' is not known\. Did you mean h100.*Use one of: a10, .*v100"):
        find_device("h10")
    with pytest.raises(PlanError, match=r"'abacus' is not known\. Use one of"):
        find_device("abacus")


def test_nearest_device_when_several_are_near_is_the_slowest() -> None:
    near = nearest_device("NVIDIA H100 NVL")
    assert near is not None
    assert near.name == "h100-pcie"
    assert nearest_device("abacus") is None


def test_aliases_when_reduced_lead_to_listed_devices_and_are_unlike_each_other() -> None:
    assert set(ALIASES.values()) <= set(DEVICES)
    assert all(find_device(alias).name == key for alias, key in ALIASES.items())
    assert all(find_device(name).note for name in ASSUMED)


@pytest.mark.parametrize("name", DEVICES)
def test_figures_when_compared_are_of_the_right_order(name: str) -> None:
    device = DEVICES[name]
    assert set(device.dense) <= set(DTYPES)
    assert 14 < device.memory_gib < 192
    assert device.dense["fp32"] < device.dense["fp16"]
    if "fp8" in device.dense:
        assert device.dense["fp8"] == pytest.approx(2 * device.dense["fp16"], rel=0.02)
    if "tf32" in device.dense and not name.startswith(("rtx", "l4")):
        assert device.dense["tf32"] == pytest.approx(device.dense["fp16"] / 2, rel=0.02)
    assert set(device.efficiency) <= set(device.dense)
    assert device.source


def test_figures_when_known_for_sure_are_these() -> None:
    h200 = find_device("h200")
    assert h200.memory_gib == pytest.approx(139.8)
    assert h200.peak("bf16") == pytest.approx(989e12, rel=1e-3)
    assert h200.hbm_bytes_per_s == 4.8e12
    assert (h200.link.kind, h200.link.bytes_per_s, h200.link_domain) == ("nvlink", 450e9, 8)
    assert find_device("gb200").link_domain == 72
    assert find_device("3090").link.kind == "pcie"
    assert find_device("a100-40").memory_bytes < 40 * 2**30


@pytest.mark.parametrize("name", ["v100", "t4"])
def test_peak_when_the_card_lacks_bf16_says_what_it_has(name: str) -> None:
    device = find_device(name)
    assert device.best_half == "fp16"
    with pytest.raises(PlanError, match="has no bf16. Use fp32 or fp16"):
        device.peak("bf16")


def test_matmul_efficiency_when_measured_on_an_h200_gives_800_tflops() -> None:
    device = find_device("h200")
    flops = 2.0 * 8192**3
    assert flops / device.matmul_seconds(flops, "bf16") == pytest.approx(800e12, rel=0.01)
    assert device.matmul_efficiency(1e15, "bf16") == device.matmul_efficiency(flops, "bf16")


@pytest.mark.parametrize("name", DEVICES)
def test_matmul_efficiency_when_products_shrink_never_takes_less_than_a_launch(name: str) -> None:
    device = DEVICES[name]
    dtype = device.best_half
    times = [device.matmul_seconds(flops, dtype) for flops in (1e3, 1e6, 1e7, 1e8, 1e9, 1e10, 1e11, 1e12, 1e13)]
    assert all(later > 0.95 * earlier for earlier, later in itertools.pairwise(times))
    assert times[0] > 3e-6
    assert times[0] == pytest.approx(times[1])
    assert all(0 < device.matmul_efficiency(10**power, dtype) <= 1 for power in range(3, 15))


def test_matmul_efficiency_when_a_dtype_has_no_curve_takes_the_one_of_equal_time() -> None:
    device = find_device("h100")
    ratio = device.dense["fp8"] / device.dense["bf16"]
    assert device.matmul_efficiency(4e9 * ratio, "fp8") == pytest.approx(device.matmul_efficiency(4e9, "bf16"))


def test_share_at_when_between_points_is_linear_in_the_logarithm() -> None:
    curve = ((1e8, 0.1), (1e10, 0.5))
    assert share_at(curve, 1e9) == pytest.approx(0.3)
    assert share_at(curve, 1e7) == pytest.approx(0.01)
    assert share_at(curve, 1e12) == 0.5


def test_link_when_a_group_fits_a_node_is_the_devices() -> None:
    cluster = build_cluster("h100", gpus=8, nodes=4)
    assert cluster.world_size == 32
    assert cluster.link(8) == cluster.link(2, 4) == cluster.link(1, 16) == cluster.device.link
    assert cluster.link(16).kind == cluster.link(2, 8).kind == "network"
    # groups of 3 do not tile a node of 8: one of them crosses
    assert cluster.link(3).kind == "network"


def test_link_when_groups_cross_shares_the_network_among_those_that_do() -> None:
    cluster = build_cluster("h100", gpus=8, nodes=4, node_link="3.2T")
    # one ring through all GPUs of a node has all eight ports of 50 GB/s
    assert cluster.link(32).bytes_per_s == 400e9
    # two interleaved rings have half of them, eight rings one port each
    assert cluster.link(16, 2).bytes_per_s == 200e9
    assert cluster.link(4, 8).bytes_per_s == 50e9
    assert cluster.link(2, 16).bytes_per_s == 50e9
    # in an all-to-all every GPU sends across at once
    assert cluster.link(32, all_to_all=True).bytes_per_s == 50e9
    assert cluster.link(32).latency_s > cluster.link(8).latency_s


def test_link_when_the_network_is_faster_than_the_cards_is_at_most_theirs() -> None:
    cluster = build_cluster("l4", gpus=4, nodes=2, node_link="3.2T")
    assert cluster.link(8).bytes_per_s == cluster.device.link.bytes_per_s


def test_link_when_nvlink_spans_nodes_reaches_the_rack() -> None:
    rack = build_cluster("gb200", gpus=4, nodes=36)
    assert rack.domain == 72
    assert rack.link(72) == rack.device.link
    # eighteen nodes of 4 x 400 Gbit/s leave the rack
    assert rack.link(2, 72).bytes_per_s == pytest.approx(50e9)
    assert build_cluster("gb200", gpus=4, nodes=2).link(8).kind == "nvlink"
    assert build_cluster("h100", gpus=4, nodes=2).link(8).kind == "network"


def test_node_link_when_not_given_is_usual_for_the_card() -> None:
    gbit = {name: default_node_link(find_device(name), 8).bytes_per_s * 8 / 1e9 for name in LISTED}
    assert gbit["h100"] == gbit["h200"] == gbit["b200"] == 3200
    assert gbit["a100-80"] == 1600
    assert gbit["v100"] == 400
    assert gbit["t4"] == gbit["rtx4090"] == 100
    assert default_node_link(find_device("t4"), 1).bytes_per_s == 12.5e9


def test_node_link_when_named_is_of_the_node() -> None:
    assert parse_node_link("3.2t").bytes_per_s == parse_node_link(3200).bytes_per_s == 400e9
    assert {parse_node_link(name).kind for name in NODE_LINKS} == {"network"}
    for wrong in ("fast", 0, -1, True):
        with pytest.raises(PlanError, match=r"node_link: .* is not known. Use 100G"):
            parse_node_link(wrong)


@pytest.mark.parametrize(("gpus", "nodes"), [(0, 1), (8, 0), (-1, 2)])
def test_cluster_when_empty_is_refused(gpus: int, nodes: int) -> None:
    with pytest.raises(PlanError, match="at least 1"):
        build_cluster("h100", gpus, nodes)


def test_describe_when_several_nodes_tells_the_network() -> None:
    assert build_cluster("h200", 8, 2).describe() == ("2 nodes of 8 x NVIDIA H200 SXM 141GB, 3.2 Tbit/s between nodes")
    assert build_cluster("l4", 2).describe() == "2 x NVIDIA L4 24GB"
    assert math.isclose(build_cluster("l4", 2, 2).node_link.bytes_per_s, 12.5e9)
