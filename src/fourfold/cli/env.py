"""`fourfold env`: what a bug report needs."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys

from fourfold.cli.session import clear_errors
from fourfold.version import __version__

_PACKAGES = (
    "torch", "transformers", "peft", "datasets", "safetensors", "tokenizers", "pydantic", "typer", "numpy",
    "bitsandbytes", "liger-kernel", "accelerate", "wandb", "tensorboard", "gguf", "triton",
)  # fmt: skip
_VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "HF_HOME", "HF_HUB_OFFLINE", "NNODES", "NODE_RANK", "NPROC_PER_NODE",
    "MASTER_ADDR", "MASTER_PORT", "FORCE_TORCHRUN", "NCCL_DEBUG", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF",
    "ALLOW_EXTRA_ARGS",
)  # fmt: skip


def env() -> None:
    """Print versions and devices, for a bug report."""
    with clear_errors():
        print(report())


def report() -> str:
    """Versions, devices and the environment variables that matter, a line each."""
    rows = [
        ("fourfold", __version__),
        ("python", f"{platform.python_version()} ({sys.executable})"),
        ("platform", platform.platform()),
        ("cpu", f"{_cpu_name()}, {_usable_cores()} of {os.cpu_count()} cores usable"),
        ("memory", _memory()),
        *((name, _version(name)) for name in _PACKAGES),
        *_devices(),
        *((name, os.environ[name]) for name in _VARIABLES if name in os.environ),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123
            names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
            return next(names, platform.machine())
    except OSError:
        return platform.processor() or platform.machine()


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
    except (ValueError, OSError):
        return "unknown"


def _devices() -> list[tuple[str, str]]:
    """What torch sees, and the driver's own list; a broken installation is reported, not raised."""
    rows = [("driver", _nvidia_smi())]
    try:
        import torch
    except (ImportError, OSError) as error:  # a missing shared library is an OSError
        return [*rows, ("torch import", f"fails: {error}")]
    rows.append(("cuda in torch", torch.version.cuda or "none"))
    if not torch.cuda.is_available():
        return [*rows, ("gpus", "none usable by torch")]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        major, minor = properties.major, properties.minor
        memory = f"{properties.total_memory / 2**30:.1f} GiB"
        rows.append((f"gpu {index}", f"{properties.name}, {memory}, compute capability {major}.{minor}"))
    return rows


def _nvidia_smi() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return "no nvidia-smi"
    try:
        query = [program, "--query-gpu=driver_version,name", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi fails: {error}"
    return "; ".join(done.stdout.strip().splitlines()) or done.stderr.strip() or "no GPU listed"
