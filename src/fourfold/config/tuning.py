"""Keys of the tuning: which parameters are trained."""

from __future__ import annotations

from typing import ClassVar, Literal

from fourfold.config.key import CommaList, Section, key


class TuningConfig(Section):
    """Full, freeze or LoRA, and their settings."""

    title: ClassVar[str] = "Tuning"

    finetuning_type: Literal["lora", "freeze", "full"] = key(
        "lora",
        "What is trained: low-rank adapters, a few layers, or everything.",
        refused={"oft": "OFT adapters are not supported. Use finetuning_type: lora."},
    )

    freeze_trainable_layers: int = key(
        2, "Layers that are trained: the last n, or the first n if negative.", group="Freeze"
    )
    freeze_trainable_modules: CommaList = key(
        ("all",), "Modules of those layers that are trained, comma-separated; all takes every one.", group="Freeze"
    )
    freeze_extra_modules: CommaList = key(
        (), "Modules outside the layers that are trained too, e.g. embed_tokens,norm.", group="Freeze"
    )

    lora_rank: int = key(8, "Rank of the adapters.", group="LoRA", ge=1)
    lora_alpha: int | None = key(
        None, "Scale of the adapters is alpha / rank; default: twice the rank.", group="LoRA", ge=1
    )
    lora_dropout: float = key(0.0, "Dropout on the adapters' input.", group="LoRA", ge=0, lt=1)
    lora_target: CommaList = key(
        ("all",), "Linear layers that get an adapter, comma-separated; all takes every one.", group="LoRA"
    )
    additional_target: CommaList = key(
        (), "Modules trained in full beside the adapters and saved with them, e.g. embed_tokens.", group="LoRA"
    )
    loraplus_lr_ratio: float | None = key(None, "LoRA+: learning rate of B over that of A.", group="LoRA", gt=0)
    loraplus_lr_embedding: float = key(1e-6, "LoRA+: learning rate of embedding adapters.", group="LoRA", ge=0)
    use_rslora: bool = key(False, "Scale by alpha / sqrt(rank) instead.", group="LoRA")
    use_dora: bool = key(False, "DoRA: train magnitude and direction apart.", group="LoRA")
    pissa_init: bool = key(False, "PiSSA: start from the weights' principal components.", group="LoRA")
    pissa_iter: int = key(
        16, "PiSSA: iterations of the fast decomposition; -1 decomposes exactly.", group="LoRA", ge=-1
    )
    pissa_convert: bool = key(
        False, "Save a PiSSA adapter as a plain LoRA adapter of the unchanged base.", group="LoRA"
    )
    create_new_adapter: bool = key(
        False, "Merge the given adapters and train a new one, instead of training the last further.", group="LoRA"
    )
