"""Known noise of the libraries below, each with its cause and what will end it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging

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
def recompute_noise_ignored() -> Iterator[None]:
    """Transformers 5.24 renamed what turns recompute on; ends when 5.17, which has only the old name, is not met."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`gradient_checkpointing_enable` is deprecated")
        yield


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
