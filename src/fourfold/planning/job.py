"""What is trained, as the planner sees it: everything of a run but its layout."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from fourfold.base.errors import ConfigError
from fourfold.config.schema import Run
from fourfold.planning.shape import ModelShape

Recompute = Literal["none", "selective", "full"]
EngineName = Literal["eager", "compiled", "around", "replayed"]
RECOMPUTES: tuple[Recompute, ...] = ("none", "selective", "full")

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}

CHUNK_TOKENS = 2048
"""Positions whose logits exist at one time."""
LOW_MEMORY_CHUNK = 256
"""The same under `memory: low`."""
KEPT_CHUNK_TOKENS = 8192
"""The same where logits are kept: cut for 32-bit indices alone, since each cut adds a gradient of the head."""
_WITHOUT_LOGITS = ("rm",)
"""Stages whose loss reads a value head alone (models/value_head.py)."""


@dataclass(frozen=True, slots=True)
class Teacher:
    """A second model, which is held and never trained.

    Attributes:
        bits, double_quant: as of a job.
    """

    shape: ModelShape
    bits: int | None = None
    double_quant: bool = True

    @classmethod
    def of(cls, run: Run, shape: ModelShape) -> Teacher:
        """The teacher of a run that loads it as its model (`config.second.teacher_run`)."""
        own = shape.own_bits is not None
        bits = run.model.quantization_bit or shape.own_bits
        return cls(shape, bits, shape.own_double_quant if own else run.model.double_quantization)


@dataclass(frozen=True, slots=True)
class Job:
    """A training job.

    Attributes:
        tuning: what is trained.
        lora_rank, lora_targets: of adapters; the kinds of linear layers, `all` for each.
        trained_layers: layers that freeze tuning trains, last ones first.
        bits: that frozen linear layers are packed into; None for plain weights.
        double_quant: whether the scales of packed weights are quantised, too.
        compute: dtype of the products.
        master: dtype of trained weights, gradients and optimizer state.
        optim: name of the optimizer.
        sequence: positions of the longest sequence.
        micro_batch: positions of a micro-batch on one data-parallel rank, before cp ranks share them.
        sequences_per_step: sequences of an optimizer step over all data-parallel ranks, at their longest.
        packed: documents laid end to end in one row.
        trained_share: of the positions, those that are trained on, whose logits are made; 0 for a loss without logits.
        chunk: positions whose logits exist at one time.
        keeps_logits: those of all chunks are kept for the backward pass, in the compute dtype.
        keeps_copies: of trained matrices in the compute dtype, from update to update.
        teacher: that is learnt from; None for none.
        engine: what runs the layers (planning/engines.py).
        keys_once: attention reads keys where they are, once for all query heads and queries (`has_own_attention`).
        float8: trained layers multiply in float8.
        spared: the last layers, of which nothing is computed again where others are; not in pipelines.
        host_embedding: a frozen embedding that is no head stays in host memory, where one GPU has the whole model.
    """

    tuning: Literal["full", "lora", "freeze"] = "lora"
    lora_rank: int = 8
    lora_targets: tuple[str, ...] = ("all",)
    trained_layers: int = 2
    bits: int | None = None
    double_quant: bool = True
    compute: Literal["fp32", "bf16", "fp16"] = "bf16"
    master: Literal["fp32", "bf16"] = "fp32"
    optim: str = "adamw_torch"
    sequence: int = 2048
    micro_batch: int = 2048
    sequences_per_step: int = 8
    packed: bool = True
    trained_share: float = 1.0
    chunk: int = CHUNK_TOKENS
    keeps_logits: bool = False
    keeps_copies: bool = False
    teacher: Teacher | None = None
    engine: EngineName = "eager"
    keys_once: bool = False
    float8: bool = False
    spared: int = 0
    host_embedding: bool = False

    @property
    def compute_bytes(self) -> int:
        """Bytes of a number of the compute dtype."""
        return BYTES[self.compute]

    @property
    def master_bytes(self) -> int:
        """Bytes of a trained number."""
        return BYTES[self.master]

    @property
    def is_mixed(self) -> bool:
        """Whether trained weights are wider than the computation."""
        return self.master_bytes > self.compute_bytes

    @property
    def copies_itself(self) -> bool:
        """Whether layers, and not autocast, copy trained weights to the compute dtype (models/masters.py)."""
        return self.tuning != "lora" and self.is_mixed and self.engine != "eager" and not self.float8

    @property
    def tokens_per_step(self) -> int:
        """Positions of an optimizer step over all ranks."""
        return self.sequences_per_step * self.sequence

    def on(self, own_bits: int | None, double_quant: bool) -> Job:
        """The job on a checkpoint whose linear layers may be packed already.

        Args:
            own_bits: of the checkpoint; None for plain weights.
            double_quant: whether its scales are quantised, too.
        Raises:
            ConfigError: the job asks for other bits, or trains weights that are packed.
        """
        if own_bits is None:
            return self
        if self.bits not in (None, own_bits):
            raise ConfigError(
                f"quantization_bit: {self.bits} contradicts the checkpoint, which is quantised to {own_bits} bits. "
                "Leave quantization_bit out."
            )
        if self.tuning != "lora":
            raise ConfigError(
                f"finetuning_type: {self.tuning} cannot train the {own_bits}-bit weights of this checkpoint. "
                "Use finetuning_type: lora."
            )
        return replace(self, bits=own_bits, double_quant=double_quant)

    @classmethod
    def of(cls, run: Run, *, dp: int = 1) -> Job:
        """The job of a run's config.

        Args:
            dp: data-parallel ranks, which the number of sequences of a step depends on.
        """
        training, tuning = run.training, run.tuning
        per_rank = training.per_device_train_batch_size * training.gradient_accumulation_steps
        kind = tuning.finetuning_type
        sequence = run.data.cutoff_len
        tokens = training.micro_batch_tokens or training.per_device_train_batch_size * sequence
        assert kind in ("full", "lora", "freeze")
        return cls(
            tuning=kind,
            lora_rank=tuning.lora_rank,
            lora_targets=tuple(tuning.lora_target),
            trained_layers=abs(tuning.freeze_trainable_layers),
            bits=run.model.quantization_bit,
            double_quant=run.model.double_quantization,
            compute="bf16" if training.bf16 or training.pure_bf16 else "fp16" if training.fp16 else "fp32",
            master="bf16" if training.pure_bf16 else "fp32",
            optim=training.optim,
            sequence=sequence,
            micro_batch=max(tokens, sequence),
            sequences_per_step=training.global_batch_size or per_rank * dp,
            packed=run.model.flash_attn in ("auto", "fa2", "fa3"),
            trained_share=0.0 if training.stage in _WITHOUT_LOGITS else 1.0,
            chunk=LOW_MEMORY_CHUNK if run.parallel.memory == "low" else CHUNK_TOKENS,
            float8=training.fp8,
            host_embedding=run.parallel.memory == "low",
        )
