"""Which layers of a model can be trained in part: linear kinds for LoRA, blocks and modules for freezing."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from fourfold.base.errors import ConfigError
from fourfold.base.log import get_logger
from fourfold.base.registry import nearest

log = get_logger(__name__)

ALL = "all"
"""Value of `lora_target` that takes every linear kind."""


def linear_kinds(model: PreTrainedModel) -> list[str]:
    """The kinds of linear layers, by the last part of their names, in order of appearance; never the head.

    Quantised linear layers of bitsandbytes are linear layers too.
    """
    head = model.get_output_embeddings()
    kinds: dict[str, None] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            kinds[_kind(name)] = None
    return list(kinds)


def _kind(name: str) -> str:
    """The shortest ending of a module's name that says what it is: `q_proj`, or `mlp.0` where that is a number."""
    parts = name.split(".")
    start = len(parts) - 1
    while start > 0 and parts[start].isdigit():
        start -= 1
    return ".".join(parts[start:])


def lora_targets(model: PreTrainedModel, wanted: tuple[str, ...]) -> list[str]:
    """The linear kinds that `lora_target` names.

    Raises:
        ConfigError: a name matches no layer; the message lists the kinds there are.
    """
    kinds = linear_kinds(model)
    if ALL in wanted:
        log.info("Found linear modules: %s", ",".join(kinds))
        return kinds
    check_names(model, "lora_target", wanted, kinds)
    return list(wanted)


def check_names(model: PreTrainedModel, key: str, wanted: tuple[str, ...], kinds: list[str]) -> None:
    """Refuse names that end no module's name.

    Args:
        kinds: the names to list in the message.
    Raises:
        ConfigError: some name matches nothing.
    """
    names = [name for name, _ in model.named_modules()]
    missing = [want for want in wanted if not any(name == want or name.endswith("." + want) for name in names)]
    if missing:
        close = sorted({near for name in missing for near in nearest(name, kinds)})
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise ConfigError(
            f"{key}: {', '.join(missing)} matches no module of this {model.config.model_type} model.{hint} "
            f"Use {ALL} or some of: {', '.join(kinds)}."
        )
