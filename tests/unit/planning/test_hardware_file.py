"""Hardware that a user describes, and measured figures that replace the catalogue's."""

from __future__ import annotations

from pathlib import Path

import pytest

from fourfold.base.errors import PlanError
from fourfold.planning.hardware import find_device
from fourfold.planning.hardware_file import read_calibration, read_hardware


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "hardware.yaml"


def test_read_hardware_when_a_card_is_named_takes_its_figures_and_the_changes(file: Path) -> None:
    file.write_text("gpu: H100 SXM\ngpus: 8\nnodes: 4\nnode_link: 1.6T\nmemory_gib: 78\nlink_gb_s: 400\n")
    cluster = read_hardware(file)
    assert (cluster.per_node, cluster.nodes, cluster.node_link.bytes_per_s) == (8, 4, 200e9)
    device = cluster.device
    assert (device.name, device.memory_gib) == ("h100", 78)
    assert (device.link.kind, device.link.bytes_per_s) == ("nvlink", 400e9)
    assert device.peak("bf16") == find_device("h100").peak("bf16")


def test_read_hardware_when_only_figures_are_given_is_enough(file: Path) -> None:
    file.write_text(
        "title: Own card\nmemory_gib: 47.5\nflops: {bf16: 400e12, fp32: 80e12}\nhbm_gb_s: 1300\n"
        "link_gb_s: 50\ngpus: 2\n"
    )
    cluster = read_hardware(file)
    device = cluster.device
    assert (device.title, device.memory_gib, device.hbm_bytes_per_s) == ("Own card", 47.5, 1.3e12)
    assert dict(device.dense) == {"bf16": 400e12, "fp32": 80e12}
    assert (device.link.kind, device.link.bytes_per_s) == ("pcie", 50e9)
    assert device.matmul_efficiency(1e13, "bf16") == pytest.approx(0.81)
    assert cluster.world_size == 2


def test_read_hardware_when_wrong_tells_all_at_once(file: Path) -> None:
    file.write_text(
        "gpu: h1000\ngpu_count: 8\nnode: 2\ngpus: 0\nnode_link: quick\nflops: {bf16: 989, int4: 1e15}\nlink: nvlik\n"
    )
    with pytest.raises(PlanError) as raised:
        read_hardware(file)
    lines = str(raised.value).splitlines()
    assert all(line.startswith(f"{file}: ") for line in lines)
    text = str(raised.value)
    assert len(lines) == 8
    assert "gpu: 'h1000' is not known. Did you mean h100" in text
    assert "gpu_count: there is no such key. Use gpu, title, gpus, nodes, node_link" in text
    assert "node: there is no such key. Did you mean nodes or node_link?" in text
    assert "gpus: 0 is not valid. Use a whole number of at least 1." in text
    assert "node_link: 'quick' is not valid. Use 100G, 200G" in text
    assert "flops.bf16: 989 FLOP/s is too slow for a GPU. Write 989e12 for TFLOP/s." in text
    assert "flops: 'int4' is not known." in text
    assert "link: 'nvlik' is not valid. Use nvlink, xgmi or pcie." in text


def test_read_hardware_when_neither_card_nor_figures_says_what_is_missing(file: Path) -> None:
    file.write_text("gpus: 8\nmemory_gib: 80\n")
    with pytest.raises(PlanError, match="gpu: is not given, and flops, hbm_gb_s, link_gb_s neither"):
        read_hardware(file)


@pytest.mark.parametrize(
    ("text", "message"), [("- h100\n", "not a mapping"), ("gpu: [\n", "not YAML"), ("gpu: h100\ngpu: l4\n", "twice")]
)
def test_read_hardware_when_not_a_mapping_is_refused(file: Path, text: str, message: str) -> None:
    file.write_text(text)
    with pytest.raises(PlanError, match=message):
        read_hardware(file)


def test_read_hardware_when_absent_is_refused(file: Path) -> None:
    with pytest.raises(PlanError, match="cannot be read"):
        read_hardware(file)


def test_read_calibration_when_measured_replaces_curve_and_memory_rate(file: Path, tmp_path: Path) -> None:
    (tmp_path / "measured.json").write_text('{"efficiency": {"bf16": [[1e9, 0.2], [1e11, 0.6]]}, "hbm_gb_s": 4300}')
    file.write_text("gpu: h200\ncalibration: measured.json\n")
    device = read_hardware(file).device
    assert device.matmul_efficiency(1e10, "bf16") == pytest.approx(0.4)
    # fp16 has no curve of its own and the same peak
    assert device.matmul_efficiency(1e10, "fp16") == pytest.approx(0.4)
    assert device.hbm_bytes_per_s == 4.3e12


def test_read_calibration_when_wrong_tells_all_at_once(tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    path.write_text('{"efficiency": {"bf16": [[1e11, 0.6], [1e9, 0.2]], "int8": [[1, 1]]}, "hbm_gb_s": -1, "hbm": 1}')
    with pytest.raises(PlanError) as raised:
        read_calibration(path, find_device("h200"))
    text = str(raised.value)
    assert len(text.splitlines()) == 4
    assert "efficiency.bf16: is not a list of [FLOPs, share]" in text
    assert "has no 'int8'" in text
    assert "hbm_gb_s: -1 is not valid" in text
    assert "hbm: there is no such key" in text
