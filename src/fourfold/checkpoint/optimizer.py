"""An optimizer's state by parameter names: tensors as safetensors, numbers as JSON; no pickle.

The names are the Transformers state-dict names (PEFT's for adapters), so the state does not depend on the order or
grouping of parameters.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fourfold.base.errors import CheckpointError
from fourfold.parallel.sharded import cut_alike, full

TENSORS = "optimizer.safetensors"
NUMBERS = "optimizer.json"
_SEPARATOR = "|"


@dataclass(frozen=True, slots=True)
class OptimizerState:
    """An optimizer's state, whole and on the host.

    Attributes:
        tensors: `<parameter name>|<state name>` -> tensor.
        content: what is written as JSON.
    """

    tensors: dict[str, Tensor]
    content: dict[str, Any]

    def write(self, folder: Path) -> None:
        """Write `optimizer.safetensors` and `optimizer.json` into `folder`."""
        save_file(self.tensors, folder / TENSORS)
        (folder / NUMBERS).write_text(json.dumps(self.content), encoding="utf-8")


def gather_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> OptimizerState:
    """Collect the state of all parameters, sharded ones made whole; every rank must call."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for parameter, state in optimizer.state.items():
        name = names[parameter]
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{name}{_SEPARATOR}{key}"] = full(value.detach()).cpu().contiguous().clone()
            else:
                numbers.setdefault(name, {})[key] = value
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return OptimizerState(tensors, {"numbers": numbers, "groups": groups, "class": type(optimizer).__name__})


def load_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, folder: Path) -> None:
    """Restore in place what `gather_optimizer` collected; settings such as weight decay stay as the config has them.

    Raises:
        CheckpointError: another kind of optimizer, or a trained parameter without state.
    """
    content = json.loads((folder / NUMBERS).read_text(encoding="utf-8"))
    if content["class"] != type(optimizer).__name__:
        raise CheckpointError(
            f"{folder}: holds the state of {content['class']}, this run uses {type(optimizer).__name__}. "
            "Set optim as it was, or start a new run from the checkpoint's weights."
        )
    parameters = dict(model.named_parameters())
    host_scalars = {
        parameter
        for group in optimizer.param_groups
        for parameter in group["params"]
        if not (group.get("fused") or group.get("capturable"))
    }
    states: dict[Tensor, dict[str, Any]] = {}
    with safe_open(folder / TENSORS, framework="pt") as file:
        for entry in file.keys():  # noqa: SIM118 (not a mapping)
            name, _, key = entry.rpartition(_SEPARATOR)
            if name not in parameters:
                raise CheckpointError(f"{folder / TENSORS}: has state for {name}, which this model does not have.")
            parameter, value = parameters[name], file.get_tensor(entry)
            on_host = value.ndim == 0 and parameter in host_scalars
            shaped = value.shape == parameter.shape
            placed = value if on_host else cut_alike(value, parameter) if shaped else value.to(parameter.device)
            states.setdefault(parameter, {})[key] = placed
    for name, entries in content["numbers"].items():
        states.setdefault(parameters[name], {}).update(entries)
    optimizer.state.clear()
    optimizer.state.update(states)
    for group, saved in zip(optimizer.param_groups, content["groups"], strict=True):
        group.update({key: value for key, value in saved.items() if key == "lr" or key not in group})
