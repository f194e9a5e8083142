"""The keys of other tools, as sections that no run holds: their values are mapped to ours, or refused."""

from __future__ import annotations

from fourfold.config.compat.accelerate import AccelerateKeys
from fourfold.config.compat.deepspeed import DeepSpeedKeys
from fourfold.config.compat.llamafactory import LlamaFactoryKeys
from fourfold.config.compat.megatron import MegatronKeys
from fourfold.config.compat.refused import RefusedKeys
from fourfold.config.compat.transformers import TransformersKeys
from fourfold.config.compat.trl import TrlKeys
from fourfold.config.key import Section

COMPAT: tuple[type[Section], ...] = (
    LlamaFactoryKeys,
    TransformersKeys,
    TrlKeys,
    AccelerateKeys,
    DeepSpeedKeys,
    MegatronKeys,
    RefusedKeys,
)
"""In the order in which they are listed and mapped."""
