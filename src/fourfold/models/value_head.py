"""The value head: one number for every hidden state, beside or in place of the logits.

It is a child of the Transformers model, so whatever splits the model splits it along: FSDP's root unit holds it as it
holds the head, and a pipeline's last stage has it. On disk it is a file of its own, beside an adapter or a model, under
the names that LLaMA-Factory and TRL give it; the model's own files stay what Transformers and PEFT read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fourfold.base.errors import ConfigError, ModelError
from fourfold.base.log import get_logger
from fourfold.config.model import ModelConfig
from fourfold.models.source import check_source, explained, fetch_file, gguf_path, model_name
from fourfold.models.unwrap import TunedModel, base_model
from fourfold.parallel.shares import Shares
from fourfold.parallel.stages import VALUE_HEAD, value_head_of
from fourfold.parallel.whole import Part, gather, parts_of

log = get_logger(__name__)

FILE = "value_head.safetensors"
"""Lies beside `adapter_model.safetensors` or `model.safetensors`."""

_STAGES = ("rm", "ppo")
_ONLY_VALUES = ("rm",)
_ONLY_PAIRS = ("rm",)
_STD = 0.02


class ValueHead(nn.Module):
    """One linear layer from a hidden state to a number; computed in fp32, whatever else is.

    Attributes:
        summary: the layer, [1, hidden size] and [1].
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.summary = nn.Linear(hidden_size, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [..., hidden size] -> [...] fp32."""
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.summary.weight.float(), self.summary.bias.float()).squeeze(-1)


def reads_values(stage: str) -> bool:
    """Whether a stage trains a model with a value head."""
    return stage in _STAGES


def reads_logits(stage: str) -> bool:
    """Whether a stage's loss depends on the logits."""
    return stage not in _ONLY_VALUES


def learns_level(stage: str) -> bool:
    """Whether a stage's loss depends on the head's bias; one of pairs depends on differences of values alone."""
    return stage not in _ONLY_PAIRS


def new_value_head(hidden_size: int, *, seed: int, std: float = _STD) -> ValueHead:
    """A head that depends on nothing but its arguments: weights from N(0, std^2), bias 0; fp32, on the host.

    Args:
        std: Transformers initialises the heads of its sequence classifiers so, by the config's `initializer_range`.
    """
    head = ValueHead(hidden_size)
    with torch.no_grad():
        head.summary.weight.normal_(0.0, std, generator=torch.Generator().manual_seed(seed))
        head.summary.bias.zero_()
    return head


def add_value_head(
    module: TunedModel,
    config: ModelConfig,
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    trainable: bool = True,
    trains_bias: bool = True,
    required: bool = False,
) -> None:
    """Give a model its value head: the one that was saved with what the config names, or a new one. In place.

    Args:
        module: with its adapters, not yet split.
        seed: of a new head.
        dtype: of its weights.
        trains_bias: whether the bias is trained where the head is. Without a gradient but rounding's, AdamW would still
            move it by a learning rate a step.
        required: refuse to make a new one.
    Raises:
        ModelError: a file that is damaged or belongs to another model, or none where there must be one.
    """
    inner = base_model(module)
    text = inner.config.get_text_config()
    path = find_value_head(config)
    if path is None and required:
        raise ModelError(missing_head(config))
    std = text.to_dict().get("initializer_range") or _STD
    head = new_value_head(text.hidden_size, seed=seed, std=std)
    if path is None:
        log.info("The value head is a new one")
    else:
        _fill(head, path)
        log.info("The value head is read from %s", path)
    head = head.to(device=_device_of(inner), dtype=dtype).requires_grad_(trainable)
    head.summary.bias.requires_grad_(trainable and trains_bias)
    inner.add_module(VALUE_HEAD, head)


def _device_of(inner: nn.Module) -> torch.device:
    """Where a model has its weights; the host for one that has none yet."""
    device = next(inner.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device


def find_value_head(config: ModelConfig) -> Path | None:
    """The file of the last adapter that has one, or else of the base model; None if none has."""
    for name in reversed(config.adapter_name_or_path):
        file = f"{config.adapter_folder}/{FILE}" if config.adapter_folder else FILE
        if (path := fetch_file(name, file, config)) is not None:
            return path
    name = model_name(config)
    return None if gguf_path(name) is not None else fetch_file(name, FILE, config, revision=config.model_revision)


def check_value_head(config: ModelConfig, key: str) -> None:
    """Refuse a model that is to score and has no head, before it is loaded.

    Args:
        key: that named the model, for the message.
    Raises:
        ModelError: it has none, or is not there.
    """
    for name in filter(None, (config.model_name_or_path, *config.adapter_name_or_path)):
        check_source(name, key)
    if find_value_head(config) is None:
        raise ModelError(missing_head(config, key))


def missing_head(config: ModelConfig, key: str | None = None) -> str:
    """The message for a model that was to score and has no head; `key` where another one than usual named it."""
    adapters = config.adapter_name_or_path
    usual, name = ("adapter_name_or_path", adapters[-1]) if adapters else ("model_name_or_path", model_name(config))
    return (
        f"{key or usual}: {name} has no {FILE}, so it is no reward model. Train one with stage: rm and do_train: "
        "true, or name the folder of one."
    )


def _fill(head: ValueHead, path: Path) -> None:
    with explained(str(path), "the value head"):
        found = load_file(path)
    own = {f"{VALUE_HEAD}.{name}": parameter for name, parameter in head.named_parameters()}
    for name, parameter in own.items():
        if name not in found:
            raise ModelError(f"{path}: has no {name}. Restore the file, or leave it out to train a new value head.")
        if found[name].shape != parameter.shape:
            raise ModelError(
                f"{path}: {name} has the shape {list(found[name].shape)}, and this model needs "
                f"{list(parameter.shape)}. Use the base model that it was trained on."
            )
        parameter.data.copy_(found[name])


def freeze_head(module: TunedModel, key: str | None) -> None:
    """Leave the language model's head out of the training, where it is not the embedding, too: it gets no gradient.

    Args:
        key: of the config that has it trained, for the message; None if everything is trained.
    Raises:
        ConfigError: it was asked for by name.
    """
    inner = base_model(module)
    head, embedding = inner.get_output_embeddings(), inner.get_input_embeddings()
    tied = {id(parameter) for parameter in embedding.parameters()} if isinstance(embedding, nn.Module) else set()
    trained = [p for p in head.parameters() if p.requires_grad and id(p) not in tied] if head is not None else []
    if trained and key is not None:
        raise ConfigError(
            f"{key}: has the head trained, which gets no gradient in this stage: its loss reads a value head. Leave "
            "the head out."
        )
    for parameter in trained:
        parameter.requires_grad_(False)


# On disk.


def is_of_value_head(name: str) -> bool:
    """Whether an entry of a state dict, of a model or of a wrapper around it, belongs to its value head."""
    return f".{VALUE_HEAD}." in f".{name}"


def value_head_parts(module: TunedModel, shares: Shares) -> dict[str, Part]:
    """What this rank holds of the value head, by the names in its file; nothing if the model or this rank has none."""
    head = value_head_of(base_model(module))
    if head is None:
        return {}
    return {f"{VALUE_HEAD}.{name}": part for name, part in parts_of(head, shares).items()}


def value_head_state(module: TunedModel) -> dict[str, Tensor]:
    """The weights of the value head of a model that is not split, on the host."""
    return {name: part.local.cpu() for name, part in value_head_parts(module, Shares()).items()}


def gather_value_head(module: TunedModel, shares: Shares) -> dict[str, Tensor]:
    """The weights of the value head, copied to the host of rank 0; every rank of a model that is split must call."""
    found = gather(value_head_parts(module, shares))
    return {name: tensor.clone() for name, tensor in found if tensor is not None}


def write_value_head(weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write the file of a value head, if there are weights of one."""
    if weights:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / FILE, {"format": "pt"})
