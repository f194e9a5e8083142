"""The figures of known accelerators, each with its source.

Speeds are the makers' dense peaks with fp32 accumulation. Memory is the "total capacity" that torch reports in an
out-of-memory message of that card; where reports differ by driver (A100 79.15 to 79.25, H100 79.10 to 79.33 GiB) the
lowest is taken.

The efficiency curves are defaults, to be replaced by a measurement of the card at hand (`calibration`). Sources: for
Hopper the products of the OpenXLA table of measured matmuls on an H100 (xla/service/gpu/model/
matmul_interpolator_data.h) and 800 TFLOP/s at 8192^3, measured on an H200 in bf16; for others torch.matmul at 1024^3,
2048^3, 4096^3 and 8192^3 as collected in github.com/zzc0721/torch-performance-test-data, and the best attained rates
of github.com/stas00/ml-engineering (accelerator chapter). Where neither has a card, Hopper's curve is stretched to its
peak and plateau.
"""

from __future__ import annotations

from dataclasses import replace

from fourfold.planning.device import Curve, Device, Link, LinkKind

_T = 1e12
_CUBES = tuple(2.0 * size**3 for size in (1024, 2048, 4096, 8192))
_LAUNCH_S = 5e-6  # of a 256^3 product in the OpenXLA table: 5.2 us on an H100, 5.0 us on a B200
_LATENCY_S = {"nvlink": 3.4e-6, "xgmi": 3.4e-6, "pcie": 5.7e-6, "network": 9.6e-6}
"""Of a ring's hop, "Simple" protocol: NCCL's own model, src/graph/tuning.cc, hwLat."""

_HOPPER_LINK_SHARE = 320.4 / 450
"""Of NVLink 4, without its multicast: 320 GB/s a rank in an all-gather of 1 GiB, 317 in a reduce-scatter, 328 in an
all-to-all, 352 in an all-reduce, 353 from rank to rank; 294 and 240 in an all-gather of 256 and 64 MiB. 4 H100 SXM,
torch 2.11, NCCL, 2026-11 (benchmarks/results/multi_gpu_4xh100.json). That of the all-gather, which FSDP waits for.

Small collectives took 39 us there, 13 for each of three hops, and a single hop of a send with its receive 88: what is
measured is the call. So the latency of a hop stays NCCL's, and calls are counted apart (`traffic.CALL_S`,
`kernels.HOST_REGION`)."""

_HOPPER_PEAK = 989.4 * _T
_HOPPER: Curve = (
    (3.36e7, 0.0065),
    (6.71e7, 0.0125),
    (1.34e8, 0.022),
    (2.68e8, 0.043),
    (5.37e8, 0.083),
    (1.07e9, 0.143),
    (2.15e9, 0.239),
    (4.29e9, 0.35),
    (8.59e9, 0.50),
    (1.72e10, 0.64),
    (3.44e10, 0.74),
    (6.87e10, 0.76),
    (1.37e11, 0.79),
    (1.099e12, 0.81),
)


def _measured(peak: float, *shares: float) -> Curve:
    """A curve from the shares attained at the four cubes, and from the launch time for small products."""
    small = 1e8
    return (
        (small, min(small / (_LAUNCH_S * peak), shares[0] / 2)),
        *zip(_CUBES, shares, strict=True),
    )


def _like_hopper(peak: float, plateau: float) -> Curve:
    """Hopper's curve for a card of another peak: as high at products that take as long, up to its own plateau."""
    return tuple((flops * peak / _HOPPER_PEAK, share * plateau / _HOPPER[-1][1]) for flops, share in _HOPPER)


def link_of(kind: LinkKind, bytes_per_s: float) -> Link:
    """A link with the latency that is usual for its kind."""
    return Link(kind, bytes_per_s, _LATENCY_S[kind])


# Of PCIe x16, four fifths of the nominal rate arrive (15.75, 31.5 and 63 GB/s for generations 3, 4 and 5).
_PCIE3, _PCIE4, _PCIE5 = (link_of("pcie", rate) for rate in (12e9, 25e9, 50e9))
_PCIE_DOMAIN = 16


def _nvlink(gb_per_s: float) -> Link:
    return link_of("nvlink", gb_per_s * 1e9)


_V100 = Device(
    name="v100",
    title="NVIDIA V100 SXM2 32GB",
    memory_gib=31.73,
    dense={"fp32": 15.7 * _T, "fp16": 125 * _T},
    hbm_bytes_per_s=900e9,
    link=_nvlink(150),
    link_domain=8,
    nic_gbit_per_s=50,
    efficiency={"fp16": _measured(125 * _T, 0.46, 0.63, 0.77, 0.78)},
    source="NVIDIA V100 datasheet (Jan 2020); node network: DGX-1, 4 x 100 Gbit/s",
)
_V100_16 = replace(_V100, name="v100-16", title="NVIDIA V100 SXM2 16GB", memory_gib=15.77)
_V100_PCIE_DENSE = {"fp32": 14 * _T, "fp16": 112 * _T}

_A100_80 = Device(
    name="a100-80",
    title="NVIDIA A100 SXM4 80GB",
    memory_gib=79.15,
    dense={"fp32": 19.5 * _T, "tf32": 156 * _T, "bf16": 312 * _T, "fp16": 312 * _T},
    hbm_bytes_per_s=2039e9,
    link=_nvlink(300),
    link_domain=8,
    nic_gbit_per_s=200,
    efficiency={"bf16": _measured(312 * _T, 0.30, 0.60, 0.78, 0.85)},
    source="NVIDIA A100 datasheet (Jun 2021); node network: DGX A100, 8 x 200 Gbit/s",
)
_A100_40 = replace(_A100_80, name="a100-40", title="NVIDIA A100 SXM4 40GB", memory_gib=39.39, hbm_bytes_per_s=1555e9)
_A100_PCIE_EFFICIENCY = {"bf16": _measured(312 * _T, 0.30, 0.57, 0.75, 0.72)}

_H100 = Device(
    name="h100",
    title="NVIDIA H100 SXM 80GB",
    memory_gib=79.10,
    dense={"fp32": 66.9 * _T, "tf32": 494.7 * _T, "bf16": 989.4 * _T, "fp16": 989.4 * _T, "fp8": 1978.9 * _T},
    hbm_bytes_per_s=3352e9,
    link=replace(_nvlink(450), share=_HOPPER_LINK_SHARE),
    link_domain=8,
    nic_gbit_per_s=400,
    efficiency={"bf16": _HOPPER},
    source="NVIDIA H100 architecture whitepaper (2022), table of SXM5; node network: DGX H100, 8 x 400 Gbit/s; what of "
    "NVLink arrives: measured on 4 H100 SXM, torch 2.11, NCCL, 2026-11",
)

_B200 = Device(
    name="b200",
    title="NVIDIA B200 SXM 180GB",
    memory_gib=178.35,
    dense={"fp32": 75 * _T, "tf32": 1125 * _T, "bf16": 2250 * _T, "fp16": 2250 * _T, "fp8": 4500 * _T},
    hbm_bytes_per_s=8000e9,
    link=_nvlink(900),
    link_domain=8,
    nic_gbit_per_s=400,
    efficiency={"bf16": _like_hopper(2250 * _T, 0.77)},
    source="NVIDIA HGX B200 and DGX B200 datasheets (2024), an eighth of the system, dense",
)

_PCIE_CARDS = (
    Device(
        name="t4",
        title="NVIDIA T4 16GB",
        memory_gib=14.56,
        dense={"fp32": 8.1 * _T, "fp16": 65 * _T},
        hbm_bytes_per_s=320e9,
        link=_PCIE3,
        link_domain=_PCIE_DOMAIN,
        nic_gbit_per_s=12.5,
        # 42 TFLOP/s at best; its 70 W do not hold that for large products
        efficiency={"fp16": _measured(65 * _T, 0.50, 0.60, 0.60, 0.50)},
        source="NVIDIA T4 datasheet (2019)",
    ),
    Device(
        name="a10",
        title="NVIDIA A10 24GB",
        memory_gib=22.06,
        dense={"fp32": 31.2 * _T, "tf32": 62.5 * _T, "bf16": 125 * _T, "fp16": 125 * _T},
        hbm_bytes_per_s=600e9,
        link=_PCIE4,
        link_domain=_PCIE_DOMAIN,
        nic_gbit_per_s=12.5,
        efficiency={"bf16": _measured(125 * _T, 0.55, 0.64, 0.77, 0.74)},  # as an A40, its larger sister
        source="NVIDIA A10 datasheet (Mar 2021)",
    ),
    Device(
        name="a10g",
        title="NVIDIA A10G 24GB",
        memory_gib=22.03,
        dense={"fp32": 35 * _T, "tf32": 35 * _T, "bf16": 70 * _T, "fp16": 70 * _T},
        hbm_bytes_per_s=600e9,
        link=_PCIE4,
        link_domain=_PCIE_DOMAIN,
        nic_gbit_per_s=12.5,
        efficiency={"bf16": _measured(70 * _T, 0.68, 0.87, 0.89, 0.95)},
        source="NVIDIA A10G datasheet (AWS, Feb 2022)",
    ),
    Device(
        name="l4",
        title="NVIDIA L4 24GB",
        memory_gib=22.03,
        dense={"fp32": 30.3 * _T, "tf32": 60 * _T, "bf16": 121 * _T, "fp16": 121 * _T, "fp8": 242.5 * _T},
        hbm_bytes_per_s=300e9,
        link=_PCIE4,
        link_domain=_PCIE_DOMAIN,
        nic_gbit_per_s=12.5,
        efficiency={"bf16": _measured(121 * _T, 0.45, 0.58, 0.46, 0.49)},
        source="NVIDIA L4 datasheet (2023), half of the figures with sparsity",
    ),
    Device(
        name="l40s",
        title="NVIDIA L40S 48GB",
        memory_gib=44.39,
        dense={"fp32": 91.6 * _T, "tf32": 183 * _T, "bf16": 362.05 * _T, "fp16": 362.05 * _T, "fp8": 733 * _T},
        hbm_bytes_per_s=864e9,
        link=_PCIE4,
        link_domain=_PCIE_DOMAIN,
        nic_gbit_per_s=25,
        # 269 TFLOP/s at best; the shape of the curve is an L20's
        efficiency={"bf16": _measured(362.05 * _T, 0.45, 0.65, 0.72, 0.74)},
        source="NVIDIA L40S datasheet (2023)",
    ),
    Device(
        name="rtx3090",
        title="NVIDIA GeForce RTX 3090 24GB",
        memory_gib=23.56,
        dense={"fp32": 35.6 * _T, "tf32": 35.6 * _T, "bf16": 71 * _T, "fp16": 71 * _T},
        hbm_bytes_per_s=936e9,
        link=_PCIE4,
        link_domain=_PCIE_DOMAIN,
        nic_gbit_per_s=12.5,
        efficiency={"bf16": _measured(71 * _T, 0.75, 0.92, 1.0, 1.0)},  # 76 TFLOP/s at its boost clock
        source="NVIDIA GA102 architecture whitepaper (2021); NVLink joins only pairs, so PCIe is assumed",
    ),
    Device(
        name="rtx4090",
        title="NVIDIA GeForce RTX 4090 24GB",
        memory_gib=23.52,
        dense={"fp32": 82.6 * _T, "tf32": 82.6 * _T, "bf16": 165.2 * _T, "fp16": 165.2 * _T, "fp8": 330.3 * _T},
        hbm_bytes_per_s=1008e9,
        link=_PCIE4,
        link_domain=_PCIE_DOMAIN,
        nic_gbit_per_s=12.5,
        efficiency={"bf16": _measured(165.2 * _T, 0.70, 0.95, 0.95, 0.96)},
        source="NVIDIA Ada architecture whitepaper (2022)",
    ),
    Device(
        name="rtx5090",
        title="NVIDIA GeForce RTX 5090 32GB",
        memory_gib=31.36,
        dense={"fp32": 104.8 * _T, "tf32": 104.8 * _T, "bf16": 209.5 * _T, "fp16": 209.5 * _T, "fp8": 419 * _T},
        hbm_bytes_per_s=1792e9,
        link=_PCIE5,
        link_domain=_PCIE_DOMAIN,
        nic_gbit_per_s=12.5,
        efficiency={"bf16": _measured(209.5 * _T, 0.45, 0.80, 0.86, 1.0)},  # 179 to 237 TFLOP/s, by power limit
        source="NVIDIA RTX Blackwell architecture whitepaper (2025)",
    ),
    replace(
        _H100,
        name="h100-pcie",
        title="NVIDIA H100 PCIe 80GB",
        dense={"fp32": 51.2 * _T, "tf32": 378 * _T, "bf16": 756 * _T, "fp16": 756 * _T, "fp8": 1513 * _T},
        hbm_bytes_per_s=2039e9,
        link=_PCIE5,
        link_domain=_PCIE_DOMAIN,
        nic_gbit_per_s=25,
        efficiency={"bf16": _measured(756 * _T, 0.29, 0.60, 0.66, 0.65)},
        source="NVIDIA H100 architecture whitepaper (2022), table of PCIe; NVLink bridges join only pairs",
    ),
    *(
        replace(
            card,
            name=f"{card.name}-pcie",
            title=card.title.replace("SXM4", "PCIe"),
            link=_PCIE4,
            link_domain=_PCIE_DOMAIN,
            nic_gbit_per_s=25,
            hbm_bytes_per_s=1935e9 if card is _A100_80 else 1555e9,
            efficiency=_A100_PCIE_EFFICIENCY,
        )
        for card in (_A100_40, _A100_80)
    ),
    *(
        replace(
            card,
            name=f"{card.name}-pcie",
            title=card.title.replace("SXM2", "PCIe"),
            dense=_V100_PCIE_DENSE,
            link=_PCIE3,
            link_domain=_PCIE_DOMAIN,
            nic_gbit_per_s=12.5,
        )
        for card in (_V100_16, _V100)
    ),
)

_NVLINK_CARDS = (
    _V100,
    _V100_16,
    _A100_40,
    _A100_80,
    _H100,
    replace(
        _H100,
        name="h200",
        title="NVIDIA H200 SXM 141GB",
        memory_gib=139.80,
        hbm_bytes_per_s=4800e9,
        source="NVIDIA H200 datasheet (2024); node network: DGX H200, 8 x 400 Gbit/s",
    ),
    replace(
        _A100_80,
        name="a800",
        title="NVIDIA A800 SXM4 80GB",
        link=_nvlink(200),
        source="NVIDIA A800 datasheet (2023): an A100 with 400 GB/s of NVLink",
    ),
    replace(
        _H100,
        name="h800",
        title="NVIDIA H800 SXM 80GB",
        link=_nvlink(200),
        source="NVIDIA H800 datasheet (2023): an H100 with 400 GB/s of NVLink",
    ),
    replace(
        _H100,
        name="h20",
        title="NVIDIA H20 SXM 96GB",
        memory_gib=95.0,
        dense={"fp32": 44 * _T, "tf32": 74 * _T, "bf16": 148 * _T, "fp16": 148 * _T, "fp8": 296 * _T},
        hbm_bytes_per_s=4000e9,
        efficiency={"bf16": _like_hopper(148 * _T, 0.95)},
        source="NVIDIA H20 datasheet (2023)",
    ),
    _B200,
    replace(
        _B200,
        name="gb200",
        title="NVIDIA GB200 186GB",
        memory_gib=184.31,
        dense={"fp32": 80 * _T, "tf32": 1250 * _T, "bf16": 2500 * _T, "fp16": 2500 * _T, "fp8": 5000 * _T},
        link_domain=72,
        link_leaves_node=True,
        efficiency={"bf16": _like_hopper(2500 * _T, 0.77)},
        source="NVIDIA GB200 NVL72 datasheet (2024), a 72nd of the rack, dense; nodes have 4 GPUs",
    ),
    Device(
        name="mi300x",
        title="AMD Instinct MI300X 192GB",
        memory_gib=191.69,
        dense={"fp32": 163.4 * _T, "tf32": 653.7 * _T, "bf16": 1307.4 * _T, "fp16": 1307.4 * _T, "fp8": 2614.9 * _T},
        hbm_bytes_per_s=5300e9,
        link=link_of("xgmi", 448e9),
        link_domain=8,
        nic_gbit_per_s=400,
        efficiency={"bf16": _like_hopper(1307.4 * _T, 0.60)},
        source="AMD Instinct MI300X data sheet (2023); seven links of 64 GB/s in each direction",
    ),
)

DEVICES: dict[str, Device] = {device.name: device for device in (*_NVLINK_CARDS, *_PCIE_CARDS)}

ALIASES: dict[str, str] = {
    "v100-32": "v100",
    "v100-32-pcie": "v100-pcie",
    "v100s-32-pcie": "v100-pcie",
    "t4-16": "t4",
    "a10-24": "a10",
    "a10g-24": "a10g",
    "a100": "a100-80",
    "a100-pcie": "a100-80-pcie",
    "l4-24": "l4",
    "l40s-48": "l40s",
    "3090": "rtx3090",
    "3090-24": "rtx3090",
    "4090": "rtx4090",
    "4090-24": "rtx4090",
    "5090": "rtx5090",
    "5090-32": "rtx5090",
    "h100-80": "h100",
    "h100-80-pcie": "h100-pcie",
    "h200-141": "h200",
    "gh200": "h200",
    "gh200-480": "h200",
    "gh200-144": "h200",
    "a800-80": "a800",
    "h800-80": "h800",
    "h20-96": "h20",
    "b200-180": "b200",
    "b200-192": "b200",
    "gb200-nvl72": "gb200",
    "gb200-186": "gb200",
    "mi300x-192": "mi300x",
}
"""Other spellings, in the form that `hardware.find_device` reduces names to; their words may be in any order."""

ASSUMED: dict[str, str] = {
    "a100": "a100: taken as the card of 80 GB; the smaller one is a100-40.",
    "a100-pcie": "a100-pcie: taken as the card of 80 GB; the smaller one is a100-40-pcie.",
    "v100": "v100: taken as the card of 32 GB; the smaller one is v100-16.",
}
"""What to say where a name leaves something open."""
