"""Liger's Triton kernels for norms, rotary embedding and gated activations (github.com/linkedin/Liger-Kernel)."""

from __future__ import annotations

import importlib

from transformers import PreTrainedModel

from fourfold.base.errors import ConfigError
from fourfold.base.extras import install_extra
from fourfold.base.log import get_logger

log = get_logger(__name__)


def apply_liger(model: PreTrainedModel) -> None:
    """Exchange the layers of a model, in place, for Liger's, as far as it has them for this family.

    The loss is left alone: Fourfold's own is chunked and makes logits for trained positions only.

    Raises:
        ConfigError: liger-kernel is not installed.
    """
    if model.device.type != "cuda":
        log.warning("enable_liger_kernel: its kernels need a GPU; this run goes on without them.")
        return
    try:
        liger = importlib.import_module("liger_kernel.transformers")
    except ImportError as error:
        raise ConfigError(
            f"enable_liger_kernel: liger-kernel is not installed. Run {install_extra('kernels')}, or leave the key out."
        ) from error
    liger._apply_liger_kernel_to_instance(model, cross_entropy=False, fused_linear_cross_entropy=False)
    log.info("Liger kernels are used for %s", model.config.model_type)
