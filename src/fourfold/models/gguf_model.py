"""A Transformers model's config and weights from a GGUF file, de-quantised to fp32.

The plain dense decoders of `_FAMILIES` are converted here, in seconds. Every other architecture goes through
Transformers' own GGUF loader, which knows more of them and takes longer.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from fourfold.base.errors import ModelError
from fourfold.base.log import get_logger
from fourfold.models.gguf import GgufFile, TensorInfo, dequantize, gguf_package, read_gguf
from fourfold.models.sample import COLUMNS, sample_rows

log = get_logger(__name__)

_THREADS = 4
"""De-quantising is NumPy work that mostly releases the interpreter's lock; more threads only cost memory."""


@dataclass(frozen=True, slots=True)
class _Family:
    """How one GGUF architecture maps onto Transformers.

    Attributes:
        model_type: of the Transformers config.
        class_name: of the causal model.
        permuted: whether the file holds the q and k rows in the pairwise rotary order of llama.cpp.
    """

    model_type: str
    class_name: str
    permuted: bool = False


_FAMILIES = {
    "llama": _Family("llama", "LlamaForCausalLM", permuted=True),
    "qwen2": _Family("qwen2", "Qwen2ForCausalLM"),
    "qwen3": _Family("qwen3", "Qwen3ForCausalLM"),
}

_ROPE_FACTORS = "rope_freqs.weight"
"""Tensor that holds the llama3 rope scaling as one factor per rotary frequency; the metadata do not tell it."""


def load_gguf_config(path: Path) -> PreTrainedConfig:
    """The Transformers config that a GGUF file describes.

    Raises:
        ModelError: the file is damaged, or its architecture is not known.
    """
    file = read_gguf(path)
    gguf_package()
    if _is_plain(file):
        return _build_config(file)
    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    except ValueError as error:
        raise ModelError(
            f"model_name_or_path: {path} has architecture {file.architecture!r}, which cannot be converted ({error}). "
            "Use the model's Transformers folder."
        ) from error
    return _repair(config)


def load_gguf_weights(path: Path, config: PreTrainedConfig) -> dict[str, Tensor]:
    """The file's weights by their Transformers names, fp32, on the CPU.

    Raises:
        ModelError: the file's tensors do not fit the model that `config` describes.
    """
    file = read_gguf(path)
    gguf_package()
    if not _is_plain(file):
        return _weights_by_transformers(path)
    infos = _match(file, config)
    heads = {name: _permuted_heads(file, config, name) for name in infos}

    def read(name: str) -> Tensor:
        tensor, num_heads = dequantize(file, infos[name]), heads[name]
        return tensor if num_heads is None else tensor[_row_order(tensor.shape[0], num_heads)]

    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(infos, pool.map(read, infos), strict=True))


def sample_gguf_weights(path: Path) -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
    """A few values of every tensor, as `fourfold.models.identity` takes them from safetensors files.

    Files that are converted by Transformers are sampled under their own names and in their own row order.
    """
    file = read_gguf(path)
    gguf_package()
    config = _build_config(file) if _is_plain(file) else None
    infos = dict(file.tensors) if config is None else _match(file, config)
    for name in sorted(infos):
        info = infos[name]
        if len(info.shape) == 1:
            yield name, info.shape, dequantize(file, info)
            continue
        rows = sample_rows(info.shape)
        heads = None if config is None else _permuted_heads(file, config, name)
        if heads is not None:
            order = _row_order(info.shape[0], heads)
            rows = [int(order[row]) for row in rows]
        yield name, info.shape, dequantize(file, info, rows)[..., :COLUMNS].flatten()


def _is_plain(file: GgufFile) -> bool:
    """Whether the file is of a family converted here, without experts."""
    return file.architecture in _FAMILIES and not file.number("expert_count", 0)


def _match(file: GgufFile, config: PreTrainedConfig) -> dict[str, TensorInfo]:
    """The file's tensor for every parameter of the model; checks that none is missing, left over or misshapen."""
    gguf = gguf_package()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == file.architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    infos: dict[str, TensorInfo] = {}
    problems: list[str] = []
    for name, shape in shapes.items():
        stem, suffix = name.rsplit(".", 1)
        theirs = f"{names.get_name(stem)}.{suffix}"
        info = file.tensors.get(theirs)
        if info is None:
            problems.append(f"{theirs} is missing")
        elif info.shape != shape:
            problems.append(f"{theirs} has shape {list(info.shape)}, not {list(shape)}")
        else:
            infos[name] = info
    left_over = set(file.tensors) - {info.name for info in infos.values()} - {_ROPE_FACTORS}
    problems += [f"{name} has no place in the model" for name in sorted(left_over)]
    if problems:
        raise ModelError(
            f"model_name_or_path: {file.path} does not fit a {file.architecture} model: {'; '.join(problems[:3])} "
            f"({len(problems)} in all). Use another file, or the model's Transformers folder."
        )
    return infos


def _permuted_heads(file: GgufFile, config: PreTrainedConfig, name: str) -> int | None:
    """Heads of a q or k projection whose rows the file holds in llama.cpp's order; None for any other tensor."""
    kind = name.split(".")[-2]
    if not _FAMILIES[file.architecture].permuted or kind not in ("q_proj", "k_proj"):
        return None
    return config.num_attention_heads if kind == "q_proj" else config.num_key_value_heads


def _row_order(num_rows: int, num_heads: int) -> Tensor:
    """For each row in Transformers' rotary order (first halves, then second) where llama.cpp has it (pairs).

    Returns:
        [num_rows] int64.
    """
    half = num_rows // num_heads // 2
    return torch.arange(num_rows).reshape(num_heads, half, 2).transpose(1, 2).flatten()


def _weights_by_transformers(path: Path) -> dict[str, Tensor]:
    log.info("Converting %s with Transformers' own GGUF loader.", path)
    try:
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    except (ValueError, NotImplementedError, ImportError) as error:
        raise ModelError(
            f"model_name_or_path: {path} cannot be converted ({error}). Use the model's Transformers folder."
        ) from error
    return dict(model.state_dict())


def _short_float(value: float) -> float:
    """The shortest decimal that is this number in fp32: 9.999999747e-06 was meant as 1e-05."""
    return float(str(np.float32(value)))


def _repair(config: PreTrainedConfig) -> PreTrainedConfig:
    """Undo what is left of the file format in a config made by Transformers.

    The fp32 rounding of the epsilon is undone, and the quantisation entry is dropped: the weights are plain
    floats by then, and with it the model would refuse to be saved.
    """
    entries = config.to_dict()
    entries.pop("quantization_config", None)
    for key, value in entries.items():
        if key.endswith("_eps") and isinstance(value, float):
            entries[key] = _short_float(value)
    return type(config).from_dict(entries)


def _build_config(file: GgufFile) -> PreTrainedConfig:
    family = _FAMILIES[file.architecture]
    num_heads = int(file.number("attention.head_count"))
    head_dim = int(file.number("attention.key_length", file.number("embedding_length") // num_heads))
    if "token_embd.weight" not in file.tensors:
        raise ModelError(f"model_name_or_path: {file.path} has no token_embd.weight. Use a file of a whole model.")
    entries: dict[str, Any] = {
        "architectures": [family.class_name],
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "hidden_size": int(file.number("embedding_length")),
        "intermediate_size": int(file.number("feed_forward_length")),
        "num_hidden_layers": int(file.number("block_count")),
        "num_attention_heads": num_heads,
        "num_key_value_heads": int(file.number("attention.head_count_kv", num_heads)),
        "head_dim": head_dim,
        "max_position_embeddings": int(file.number("context_length")),
        "rms_norm_eps": _short_float(file.number("attention.layer_norm_rms_epsilon")),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "rope_parameters": _rope_parameters(file, head_dim),
    }
    if family.model_type == "llama":
        entries["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
        entries["mlp_bias"] = "blk.0.ffn_up.bias" in file.tensors
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        token = file.metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        if token is not None:
            entries[f"{ours}_token_id"] = token
    return AutoConfig.for_model(family.model_type, **entries)


def _rope_parameters(file: GgufFile, head_dim: int) -> dict[str, Any]:
    """The rotary settings: base, and the scaling as far as the file tells it."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": file.number("rope.freq_base", 10000.0)}
    kind = file.metadata.get(f"{file.architecture}.rope.scaling.type", "none")
    if kind in ("linear", "yarn"):
        rope |= {"rope_type": kind, "factor": file.number("rope.scaling.factor")}
        if kind == "yarn":
            rope["original_max_position_embeddings"] = int(file.number("rope.scaling.original_context_length"))
    elif kind != "none":
        raise ModelError(
            f"model_name_or_path: {file.path} has rope scaling {kind!r}; known are none, linear and yarn. "
            "Use the model's Transformers folder."
        )
    if _ROPE_FACTORS in file.tensors:
        rope |= _llama3_scaling(file, rope["rope_theta"], head_dim)
    return rope


def _llama3_scaling(file: GgufFile, theta: float, head_dim: int) -> dict[str, Any]:
    """The llama3 scaling whose frequency factors the file holds.

    Every model published with it has low and high frequency factors 1 and 4 and 8192 original positions; the
    factor itself is the largest entry. That these four give the file's tensor is checked, not assumed.
    Formula: wavelength w = 2 pi / f; the frequency is divided by 1 where w < 8192/4, by `factor` where w > 8192,
    and between by 1 / ((1 - s) / factor + s) with s = (8192 / w - 1) / (4 - 1)
    (transformers.modeling_rope_utils, rope type llama3).
    """
    found = dequantize(file, file.tensors[_ROPE_FACTORS]).double()
    factor, low, high, positions = float(found.max()), 1.0, 4.0, 8192
    wavelength = 2 * torch.pi * theta ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    smooth = (positions / wavelength - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    expected = torch.where(
        wavelength < positions / high, 1.0, torch.where(wavelength > positions / low, factor, between)
    )
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-3):
        raise ModelError(
            f"model_name_or_path: the rope factors of {file.path} are not llama3 scaling over {positions} positions. "
            "Use the model's Transformers folder."
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": positions,
    }
