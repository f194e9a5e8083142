"""Known noise of the libraries below, each with its cause and what will end it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from fourfold.base.peft import BaseTunerLayer, LoraModel, ParamWrapper

_PEFT_MESSAGES = (
    # PEFT 0.21 reads a property that Transformers 5.24 renamed; ends when PEFT reads `is_activation_checkpointing`.
    "`is_gradient_checkpointing` is deprecated",
    # PEFT maps gate_proj and up_proj of some mixture models onto their fused experts, with patterns of which not all
    # match; ends when PEFT matches its own patterns against parameters as well as modules.
    "The following (rank|alpha)_pattern keys did not match",
    # Continuing an adapter on a model that another one was merged into before is meant.
    "Found missing adapter keys while loading the checkpoint",
)


@contextmanager
def peft_noise_ignored() -> Iterator[None]:
    """Keep PEFT's warnings about things that are as they should be from the user."""
    with warnings.catch_warnings():
        for message in _PEFT_MESSAGES:
            warnings.filterwarnings("ignore", message=message)
        yield


@contextmanager
def adapters_have_weights() -> Iterator[None]:
    """Let PEFT give adapters weights although their base has none yet.

    PEFT 0.21 makes an adapter, initialises it, and then moves it, in two places, to where its base is: the meta device.
    Ends when PEFT leaves adapters of a base on the meta device where they are.
    """

    def cast_only(self: BaseTunerLayer, adapter_name: str, device: torch.device | None = None) -> None:
        base = self.get_param() if isinstance(self, ParamWrapper) else self.get_base_layer().weight
        assert isinstance(base, Tensor)
        if not base.is_floating_point():  # packed weights
            return
        for kind in self.adapter_layer_names:
            entries = getattr(self, kind, None)
            if isinstance(entries, nn.ModuleDict | nn.ParameterDict) and adapter_name in entries:
                entries[adapter_name] = entries[adapter_name].to(dtype=base.dtype)

    def replace_only(self: LoraModel, parent: nn.Module, name: str, new: nn.Module, old: nn.Module) -> None:
        setattr(parent, name, new)

    with (
        mock.patch.object(BaseTunerLayer, "_move_adapter_to_device_of_base_layer", cast_only),
        mock.patch.object(ParamWrapper, "_move_adapter_to_device_of_base_layer", cast_only),
        mock.patch.object(LoraModel, "_replace_module", replace_only),
    ):
        yield


@contextmanager
def recompute_noise_ignored() -> Iterator[None]:
    """Transformers 5.24 renamed what turns recompute on; ends when 5.17, which has only the old name, is not met.

    It also misses the embedding of a later pipeline stage, which reentrant recompute would need; ours is not reentrant.
    """
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`gradient_checkpointing_enable` is deprecated")
            yield
    finally:
        transformers_logging.set_verbosity(level)


@contextmanager
def bars_on_terminals_only() -> Iterator[None]:
    """Show the progress bars of Transformers (loading and writing weights) on a terminal, not in a file or a pipe."""
    if sys.stderr.isatty() or not transformers_logging.is_progress_bar_enabled():
        yield
        return
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()
