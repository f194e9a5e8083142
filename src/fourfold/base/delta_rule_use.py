"""Which gated delta nets compute their rule by `delta_rule`: those that have nothing faster here that trains."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.torch_version import TorchVersion

from fourfold.base.delta_rule import chunk_gated_delta_rule
from fourfold.base.log import get_logger

log = get_logger(__name__)

_NAME = "torch_chunk_gated_delta_rule"
"""What modules of Transformers that have gated delta nets call the rule."""


def is_wanted(device: torch.device) -> bool:
    """Whether gated delta nets would not train on this device with what Transformers finds for them, or only slowly.

    Transformers takes the kernels of flash-linear-attention (`fla`) where it can import them, and its own reference
    implementation else. The kernels are for GPUs, and their backward pass raises an error on Hopper GPUs for some
    versions of Triton, of which TileLang's take the place where it is installed (`chunk_bwd_dqkwg` of fla 0.6.0; its
    issue 640).
    """
    return not _has_fla() or device.type == "cpu" or not _fla_trains(device)


def _has_fla() -> bool:
    """Whether Transformers can import the rule from `fla`; one that is installed may not fit its surroundings."""
    try:
        return hasattr(importlib.import_module("fla.ops.gated_delta_rule"), "chunk_gated_delta_rule")
    except Exception:  # as Transformers does
        return False


def _fla_trains(device: torch.device) -> bool:
    """Whether the backward pass of `fla`, which is there, runs on a GPU."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return True
    triton = TorchVersion(importlib.import_module("triton").__version__)
    return triton < "3.4.0" or triton >= "3.7.1" or _has_tilelang()


def _has_tilelang() -> bool:
    """Whether `fla` takes TileLang's kernels: it is installed, and so is what it compiles with."""
    if importlib.util.find_spec("tilelang") is None or os.environ.get("FLA_TILELANG") == "0":
        return False
    has_compiler = getattr(importlib.import_module("fla.utils"), "has_usable_nvcc", None)  # of fla 0.6
    return has_compiler is None or has_compiler()


@contextmanager
def exchanged(mixer: nn.Module) -> Iterator[None]:
    """Within it a layer's module computes the rule as here, if it computes it at all, wherever it is."""
    place = sys.modules[type(mixer).__module__]
    own = getattr(place, _NAME, None)
    if own is None:
        yield
        return
    setattr(place, _NAME, chunk_gated_delta_rule)
    try:
        yield
    finally:
        setattr(place, _NAME, own)


def install(model: nn.Module, device: torch.device) -> bool:
    """Have a model's gated delta nets compute the rule as here, where that is wanted (`is_wanted`).

    The function is exchanged in the modules of Transformers where the model's classes are, so for all models of its
    family in this process. Calling it again changes nothing.

    Args:
        device: where the model will train.

    Returns:
        Whether they compute it as here now.
    """
    names = {kind.__module__ for part in model.modules() for kind in type(part).__mro__}
    places = [place for name in sorted(names) if hasattr(place := sys.modules.get(name), _NAME)]
    if not places or not is_wanted(device):
        return False
    others = [place for place in places if getattr(place, _NAME) is not chunk_gated_delta_rule]
    for place in others:
        setattr(place, _NAME, chunk_gated_delta_rule)
    if others and device.type == "cuda" and _has_fla():
        log.info(
            "flash-linear-attention is installed, but its gated delta rule does not train on this GPU with Triton %s: "
            "it is computed without it. Install tilelang, or Triton 3.7.1 or later, for its faster kernels.",
            importlib.import_module("triton").__version__,
        )
    return True
