"""Telling a user whose device ran out of memory what happened and what to change, best first."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from fourfold.base.errors import FourfoldError, MemoryExhaustedError
from fourfold.base.units import GIB, format_bytes
from fourfold.config.schema import Run
from fourfold.parallel.mesh import Mesh
from fourfold.parallel.recompute import Recompute
from fourfold.training.memory import peak_memory_figures

_SIGNS = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What PyTorch's errors say that are not a torch.OutOfMemoryError: of the CPU's allocator, cuBLAS, NCCL and drivers."""
_MUCH_UNUSED = 0.1
"""Share of the device that is reserved and not used, above which the allocator's gaps are worth closing."""
_CONTEXT, _MUCH_BY_OTHERS = GIB, 2 * GIB
"""What this process takes of a GPU beside what PyTorch reserves, and what others take that is worth telling."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where in a run something happened.

    Attributes:
        what: as the end of a sentence, e.g. `in step 3 of 100`.
        micro_batch_tokens: the limit of a micro-batch that was at work; 0 where none was.
        longest_sample: tokens of the longest sample, which is not cut.
        recompute: what the backward pass computed again; None where there was none.
        spared: layers of which it computed nothing again.
        generates: whether answers were generated.
    """

    what: str
    micro_batch_tokens: int = 0
    longest_sample: int = 0
    recompute: Recompute | None = None
    spared: int = 0
    generates: bool = False


@contextmanager
def exhaustion_told(run: Run, mesh: Mesh, place: Callable[[], Place]) -> Iterator[None]:
    """Tell that memory ran out in the terms of the config.

    Args:
        place: asked when it happens.
    Raises:
        MemoryExhaustedError: in place of PyTorch's error.
    """
    try:
        yield
    except FourfoldError:
        raise
    except (RuntimeError, MemoryError) as error:
        if not _is_exhaustion(error):
            raise
        raise MemoryExhaustedError(_message(run, mesh, place())) from error


def _is_exhaustion(error: RuntimeError | MemoryError) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(sign in str(error) for sign in _SIGNS)


def _message(run: Run, mesh: Mesh, place: Place) -> str:
    rank = f" of rank {mesh.rank}" if mesh.layout.world_size > 1 else ""
    lines = [f"The memory of {mesh.device}{rank} ran out {place.what} ({_peak(mesh.device)}). What helps, best first:"]
    advices = list(_advice(run, mesh, place)) or ["A smaller model, or a machine with more memory."]
    lines += (f"  {number}. {advice}" for number, advice in enumerate(advices, start=1))
    lines.append("With log_level: debug the place in the code is shown too.")
    return "\n".join(lines)


def _peak(device: torch.device) -> str:
    figures = peak_memory_figures()
    peak = f"peak {format_bytes(figures['peak_memory_gib'] * GIB)}"
    if device.type != "cuda":
        return peak
    total = torch.cuda.mem_get_info(device)[1]
    return f"{peak} in use and {figures['reserved_memory_gib']:.2f} GiB reserved, of {format_bytes(total)}"


def _advice(run: Run, mesh: Mesh, place: Place) -> Iterator[str]:
    """What to change: first what costs nothing, then what costs time, then what changes what is learnt."""
    training, tuning = run.training, run.tuning
    others = _held_by_others(mesh.device) if mesh.device.type == "cuda" else 0
    if others > _MUCH_BY_OTHERS:
        yield (
            f"{format_bytes(others)} of {mesh.device} are held by other processes (nvidia-smi shows which): end them, "
            "or choose another GPU with CUDA_VISIBLE_DEVICES."
        )
    grows = "expandable_segments:True" in os.environ.get("PYTORCH_ALLOC_CONF", "")
    if mesh.device.type == "cuda" and not grows and _unused_share(mesh.device) > _MUCH_UNUSED:
        yield "Set PYTORCH_ALLOC_CONF=expandable_segments:True: memory is reserved in pieces too small to use."
    if place.generates and training.per_device_eval_batch_size > 1:
        size = training.per_device_eval_batch_size
        yield f"per_device_eval_batch_size: {size // 2} instead of {size}."
    tokens, longest = place.micro_batch_tokens, place.longest_sample
    if tokens > longest:
        yield (
            f"micro_batch_tokens: {max(tokens // 2, longest)} instead of {tokens}, or a smaller "
            f"per_device_train_batch_size ({training.per_device_train_batch_size}) with more "
            "gradient_accumulation_steps. The loss stays the same."
        )
    if place.recompute == "none":
        yield "parallel.recompute: selective, which computes the cheap rest of each layer again instead of keeping it."
    if place.recompute in ("none", "selective") or place.spared:
        yield "parallel.recompute: full (or gradient_checkpointing: true) keeps least; about a third slower."
    if tuning.finetuning_type != "lora":
        yield f"finetuning_type: lora instead of {tuning.finetuning_type}: the base needs no gradients then."
    if run.model.quantization_bit is None:
        yield "quantization_bit: 4 (QLoRA) holds the frozen weights in a quarter of bf16's memory."
    if run.preference.teacher_model and run.preference.teacher_model_quantization_bit is None:
        yield "teacher_model_quantization_bit: 4 holds the teacher's weights in a quarter of bf16's memory."
    if mesh.layout.dp_shard == 1 and mesh.device.type == "cuda":  # processes of a CPU share its memory
        yield "strategy: fsdp on two or more GPUs, which share weights, gradients and optimizer state."
    if longest > 1:
        yield f"cutoff_len: {longest // 2}, where the longest sample has {longest} tokens; longer ones are cut."


def _unused_share(device: torch.device) -> float:
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return unused / torch.cuda.mem_get_info(device)[1]


def _held_by_others(device: torch.device) -> int:
    """Bytes of a GPU that are neither free nor this process's."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device) - _CONTEXT
