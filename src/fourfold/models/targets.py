"""Which parts of a model can be trained by themselves: linear kinds and experts for LoRA, blocks for freezing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from fourfold.base.errors import ConfigError
from fourfold.base.log import get_logger
from fourfold.base.registry import nearest

log = get_logger(__name__)

ALL = "all"
"""Value of `lora_target` and `freeze_trainable_modules` that takes every kind."""


_READ_AS_WEIGHTS = "out_proj"
_READERS = frozenset({"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"})
"""Model types in which PEFT refuses an adapter of `out_proj`, whose weight kernels read past it (PEFT 0.21,
`tuners/tuners_utils.py`)."""
INDEXERS = ".indexer."
"""In the names of what chooses the positions that sparse attention looks at (deepseek_v32, glm_moe_dsa): computed
without gradients in Transformers, and trained by a loss of its own where these models come from."""
_ARE_LINEAR = frozenset({"FalconLinear"})
"""Classes of a model's own that compute what linear layers do."""


@dataclass(frozen=True, slots=True)
class LoraTargets:
    """What gets an adapter.

    Attributes:
        modules: kinds of linear layers, PEFT's `target_modules`.
        parameters: kinds of stacked expert weights, PEFT's `target_parameters`.
    """

    modules: tuple[str, ...]
    parameters: tuple[str, ...] = ()


def linear_kinds(model: PreTrainedModel) -> list[str]:
    """The kinds of linear layers, by the last part of their names, in order of appearance; never the head, nor what has
    no gradient.

    Quantised linear layers of bitsandbytes are linear layers too.
    """
    head = model.get_output_embeddings()
    found = (name for name, module in model.named_modules() if _is_linear(module) and module is not head)
    return list(dict.fromkeys(_kind(name) for name in found if INDEXERS not in name))


def _is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, and not one of a model's own whose results are more (llama4's router)."""
    own = type(module)
    computes_itself = own.__module__.startswith("transformers.models.") and own.forward is not nn.Linear.forward
    return isinstance(module, nn.Linear) and (not computes_itself or own.__name__ in _ARE_LINEAR)


def expert_kinds(model: PreTrainedModel) -> list[str]:
    """The kinds of stacked expert weights [experts, ., .], e.g. `experts.down_proj`."""
    return list(dict.fromkeys(".".join(name.split(".")[-2:]) for name in stacked_weights(model)))


def stacked_weights(model: nn.Module) -> list[str]:
    """The names of stacked weights; those of convolutions have as many dimensions, and are none."""
    modules = (pair for pair in model.named_modules() if not isinstance(pair[1], nn.Conv1d))
    return [
        f"{prefix}.{name}"
        for prefix, module in modules
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3
    ]


def _kind(name: str) -> str:
    """The shortest ending of a module's name that says what it is: `q_proj`, or `mlp.0` where that is a number."""
    parts = name.split(".")
    start = len(parts) - 1
    while start > 0 and parts[start].isdigit():
        start -= 1
    return ".".join(parts[start:])


def lora_targets(model: PreTrainedModel, wanted: Sequence[str]) -> LoraTargets:
    """The linear layers and experts that `lora_target` names.

    Raises:
        ConfigError: a name matches nothing; the message lists the kinds there are.
    """
    linear, experts = linear_kinds(model), expert_kinds(model)
    if ALL in wanted:
        if not linear and not experts:
            raise ConfigError(
                f"lora_target: all finds no linear layer in a {model.config.model_type} model, whose own layers are of "
                "another kind. Name them (gpt2: c_attn,c_proj,c_fc), or use finetuning_type: full or freeze."
            )
        if others := [want for want in wanted if want != ALL]:
            raise ConfigError(
                f"lora_target: all takes every linear layer, so {', '.join(others)} adds nothing. Keep one of the two."
            )
        if model.config.model_type in _READERS and _READ_AS_WEIGHTS in linear:
            linear.remove(_READ_AS_WEIGHTS)
            log.info(
                "lora_target: all leaves %s out, which a %s model reads past its adapter.",
                _READ_AS_WEIGHTS,
                model.config.model_type,
            )
        return LoraTargets(tuple(linear), tuple(experts))
    modules = [name for name, _ in model.named_modules()]
    parameters = stacked_weights(model)
    as_modules = tuple(want for want in wanted if _ends_some(want, modules))
    as_parameters = tuple(want for want in wanted if want not in as_modules and _ends_some(want, parameters))
    missing = [want for want in wanted if want not in as_modules + as_parameters]
    refuse_missing(model, "lora_target", missing, [*linear, *experts])
    return LoraTargets(as_modules, as_parameters)


def check_modules(model: PreTrainedModel, key: str, wanted: Sequence[str]) -> None:
    """Refuse names of modules outside the blocks that are not in the model.

    Raises:
        ConfigError: a name matches nothing; the message lists the modules outside the blocks.
    """
    prefix = decoder_blocks(model)[0]
    names = [name for name, _ in model.named_modules() if name]
    outside = [_kind(name) for name in names if not prefix.startswith(name) and not name.startswith(prefix)]
    refuse_missing(model, key, [want for want in wanted if not _ends_some(want, names)], list(dict.fromkeys(outside)))


def _ends_some(want: str, names: Iterable[str]) -> bool:
    return any(name == want or name.endswith("." + want) for name in names)


def refuse_missing(model: PreTrainedModel, key: str, missing: Sequence[str], valid: Sequence[str]) -> None:
    """Raise for names that match nothing, with the nearest and all valid ones.

    Raises:
        ConfigError: `missing` is not empty.
    """
    if not missing:
        return
    close = sorted({near for name in missing for near in nearest(name, valid)})
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    raise ConfigError(
        f"{key}: {', '.join(missing)} matches nothing in this {model.config.model_type} model.{hint} "
        f"Use one or more of: {', '.join(valid)}."
    )


def decoder_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of decoder layers and its name, e.g. `model.layers`.

    Raises:
        ConfigError: the model has no such list.
    """
    count = model.config.num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise ConfigError(
        f"finetuning_type: freeze needs a list of {count} layers, which this {model.config.model_type} model does not "
        "have. Use full or lora."
    )


def final_norms(model: PreTrainedModel) -> list[nn.Module]:
    """The norms beside the list of decoder layers: the one behind the last of them, in most families."""
    decoder = model.get_submodule(decoder_blocks(model)[0].rpartition(".")[0])
    return [child for child in decoder.children() if "Norm" in type(child).__name__]
