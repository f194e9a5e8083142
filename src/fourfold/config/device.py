"""Whether this machine has a GPU that a run may use, found without torch."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

DRIVER_FILES = (
    (Path("/dev"), "nvidia[0-9]*"),
    (Path("/proc/driver/nvidia/gpus"), "*"),
    (Path("/dev"), "kfd"),
)
"""Folders, and the names of what the drivers of NVIDIA and AMD put there when there is a GPU."""

_HIDING = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")


def gpu_visible() -> bool:
    """Whether a GPU is present and not hidden.

    `CUDA_VISIBLE_DEVICES` (or ROCm's variables) set to nothing or to -1 hides all. Looks for the driver's device
    files, then, where those are not mapped (WSL), for the nvidia-smi program.
    """
    for variable in _HIDING:
        listed = os.environ.get(variable)
        if listed is not None and listed.split(",")[0].strip() in ("", "-1", "NoDevFiles"):
            return False
    if any(any(folder.glob(pattern)) for folder, pattern in DRIVER_FILES):
        return True
    return Path("/dev/dxg").exists() and shutil.which("nvidia-smi") is not None
