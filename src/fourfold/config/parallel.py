"""Keys of the layout: how the work is split over devices."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from fourfold.config.key import LocalPath, Section, key, later

_LAYOUTS = "layouts over several devices"


def _key(default: Any, help: str, **spec: Any) -> Any:
    return later(default, help, _LAYOUTS, **spec)


class ParallelConfig(Section):
    """The strategy by name, or each axis by number; None leaves the choice to the strategy.

    The fields in NESTED are keys of the mapping `parallel:`; the others stand at the top of the file.
    """

    title: ClassVar[str] = "Parallel"
    NESTED: ClassVar[tuple[str, ...]] = (
        "dp_replicate", "dp_shard", "cp", "tp", "pp", "ep", "sequence_parallel", "loss_parallel", "pp_schedule",
        "pp_microbatches", "pp_layers_per_stage", "pp_overlap_p2p", "reshard_after_forward", "cp_method", "offload",
        "offload_folder", "recompute", "offload_activations",
    )  # fmt: skip

    strategy: Literal["auto", "single", "ddp", "zero1", "zero2", "zero3", "fsdp", "hsdp", "tp", "pp", "custom"] = key(
        "auto",
        "How the work is split; auto takes the fastest layout that fits, by prediction (see fourfold plan); on "
        "CPUs replicas. zero3 and fsdp are the same.",
    )
    nproc: int | None = key(None, "Processes on this machine; default: one per visible GPU.", ge=1)
    memory: Literal["auto", "low"] = key(
        "auto",
        "low trades speed for the least memory: layers are computed again in the backward pass, micro-batches and "
        "chunks of logits are small, and a frozen embedding stays in host memory (where one GPU has the whole model).",
    )
    ddp_timeout: int = key(1800, "Seconds after which a collective that does not end is an error.", ge=1)

    dp_replicate: int | None = key(None, "Data-parallel replicas.", ge=1)
    dp_shard: int | None = key(None, "Data-parallel ranks that share the weights (FSDP).", ge=1)
    cp: int | None = key(None, "Context-parallel ranks: each has a part of the sequence.", ge=1)
    tp: int | None = key(None, "Tensor-parallel ranks: each has a part of every matrix.", ge=1)
    pp: int | None = key(None, "Pipeline ranks: each has a part of the layers.", ge=1)
    ep: int | None = key(None, "Expert-parallel ranks, of those of dp_shard: each has a part of the experts.", ge=1)
    sequence_parallel: bool | None = key(None, "With tp: split norms and residuals along the sequence; default: yes.")
    loss_parallel: bool | None = key(None, "With tp: split the logits along the vocabulary; default: yes.")
    pp_schedule: Literal["gpipe", "1f1b", "interleaved_1f1b", "zbv"] = key("1f1b", "Order of work in the pipeline.")
    pp_microbatches: int | None = key(
        None, "Micro-batches in the pipeline per step, at least; default: as many as ranks.", ge=1
    )
    pp_layers_per_stage: tuple[int, ...] | None = key(None, "Layers of each stage, first to last; default: even.")
    pp_overlap_p2p: bool = key(
        True,
        "With interleaved_1f1b: sends and receives between stages have process groups of their own, so that none waits "
        "behind another; without, the schedule saves nothing from 4 ranks on.",
    )
    cp_method: Literal["allgather", "ulysses", "ring"] = key(
        "allgather",
        "How context-parallel ranks see each other's keys: gathered, passed round a ring (least memory), or heads "
        "exchanged for positions (fastest where heads divide).",
    )
    reshard_after_forward: bool | None = key(
        None, "FSDP: free gathered weights after the forward pass; default: zero3 does, zero1 and zero2 do not."
    )
    offload: Literal["none", "optimizer", "params"] = key(
        "none", "What is kept in host memory: AdamW's state, or with FSDP the weights and gradients as well."
    )
    offload_folder: LocalPath | None = key(
        None, "With offload: keep AdamW's state in files of this folder (on a fast disk) instead of in host memory."
    )
    recompute: Literal["auto", "none", "selective", "full"] = key(
        "auto",
        "What the backward pass computes again: nothing, all but the results of products, or whole layers; auto takes "
        "the least that fits, and leaves out as many layers as there is room for. gradient_checkpointing: true means "
        "full.",
    )
    offload_activations: bool = key(
        False, "Keep in host memory what the backward pass needs; recompute: auto is then full."
    )
