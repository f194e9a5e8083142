"""Megatron's names, mapped onto the layout."""

from __future__ import annotations

from typing import ClassVar, Literal

from fourfold.config.compat.translation import renamed, settled, switch, translated
from fourfold.config.key import NoCounterpart, Section, Translation

_FUSED = "kernels are chosen by the device and the model"
_STAGES = "parallel.pp_layers_per_stage says which layers a stage has"
_OVERLAP = "communication is overlapped with computation wherever the layout allows"


def _virtual(value: int) -> Translation:
    return Translation({"parallel.pp_schedule": "interleaved_1f1b"}) if value > 1 else Translation()


def _precision(value: str) -> Translation:
    short = value.removesuffix("_mixed").replace("-mixed", "")
    if short in ("bf16", "fp16"):
        return Translation({short: True})
    if short in ("fp32", "no"):
        return Translation()
    raise NoCounterpart(f"{value!r} is not known. Use bf16, fp16 or fp32.")


class MegatronKeys(Section):
    """Sizes become axes of the mesh; switches of Megatron's kernels leave nothing to choose."""

    title: ClassVar[str] = "Megatron"

    tensor_model_parallel_size: int = renamed(1, "Tensor-parallel ranks.", "parallel.tp", ge=1)
    pipeline_model_parallel_size: int = renamed(1, "Pipeline stages.", "parallel.pp", ge=1)
    expert_model_parallel_size: int = renamed(1, "Expert-parallel ranks.", "parallel.ep", ge=1)
    context_parallel_size: int = renamed(1, "Context-parallel ranks.", "parallel.cp", ge=1)
    virtual_pipeline_model_parallel_size: int | None = translated(
        None, "Pipeline stages per rank.", _virtual, "parallel.pp_schedule: interleaved_1f1b"
    )
    sequence_parallel: bool = renamed(False, "Split norms along the sequence.", "parallel.sequence_parallel")
    recompute_granularity: Literal["full", "selective"] | None = renamed(
        None, "What the backward pass computes again.", "parallel.recompute"
    )
    recompute_method: Literal["uniform", "block"] | None = settled(
        None, "Which layers are recomputed.", "all layers are treated alike"
    )
    recompute_num_layers: int | None = settled(
        None, "How many layers are recomputed.", "recompute: auto leaves out as many as there is room for"
    )
    account_for_embedding_in_pipeline_split: bool = settled(False, "Count the embedding as a layer.", _STAGES)
    account_for_loss_in_pipeline_split: bool = settled(False, "Count the loss as a layer.", _STAGES)
    bias_activation_fusion: bool = settled(True, "Fuse bias and activation.", _FUSED)
    apply_rope_fusion: bool = settled(True, "Fuse rotary embeddings.", _FUSED)
    masked_softmax_fusion: bool = settled(True, "Fuse mask and softmax.", _FUSED)
    cross_entropy_loss_fusion: bool = settled(True, "Fuse the loss.", _FUSED)
    moe_grouped_gemm: bool = settled(True, "Compute experts as one grouped product.", _FUSED)
    moe_token_dispatcher_type: str = settled(
        "alltoall", "How tokens reach their experts.", "they are sent by all-to-all"
    )
    calculate_per_token_loss: bool = settled(
        True, "Average the loss over tokens.", "the loss is always a mean over the step's tokens"
    )
    use_distributed_optimizer: bool = switch("Shard the optimizer's state.", strategy="zero1")
    overlap_param_gather: bool = settled(True, "Overlap gathering of weights.", _OVERLAP)
    overlap_grad_reduce: bool = settled(True, "Overlap reduction of gradients.", _OVERLAP)
    use_packed_sequences: bool = switch("Pack sequences.", packing=True)
    mixed_precision: str | None = translated(None, "Precision.", _precision, "bf16 or fp16")
    export_hf_on_finish: bool = settled(
        True, "Write Hugging Face weights at the end.", "weights are always written in that format"
    )
