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
from safetensors.torch import save_file
from torch import Tensor, nn

from fourfold.base.errors import CheckpointError
from fourfold.models.parameters import tied_names
from fourfold.models.shard_files import ShardFiles
from fourfold.models.tensor_files import TensorFiles
from fourfold.parallel.sharded import local
from fourfold.parallel.shares import Share, Shares
from fourfold.parallel.whole import Part, Source, describe, everyone, fill, gather

TENSORS = "optimizer.safetensors"
NUMBERS = "optimizer.json"
SHARDS = "optimizer_shards"
"""Folder that holds the tensors where they are sharded."""

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
        write_numbers(self.content, folder)


def write_numbers(content: dict[str, Any], folder: Path) -> None:
    """Write `optimizer.json`, which says what the tensors belong to."""
    (folder / NUMBERS).write_text(json.dumps(content), encoding="utf-8")


def gather_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, shares: Shares) -> OptimizerState:
    """Collect the state of all parameters, whole, on rank 0; every rank of a model that is split must call.

    Returns:
        the state; on other ranks one without tensors.
    """
    parts, numbers = split_state(optimizer, model, shares)
    tensors = {name: tensor.contiguous().clone() for name, tensor in gather(parts) if tensor is not None}
    return OptimizerState(tensors, describe_optimizer(optimizer, numbers))


def split_state(
    optimizer: torch.optim.Optimizer, model: nn.Module, shares: Shares
) -> tuple[dict[str, Part], dict[str, dict[str, Any]]]:
    """The optimizer's state on this rank.

    Returns:
        the tensors as parts of whole ones, by `<parameter name>|<state name>`, and the numbers by parameter name.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in _saved_parameters(model).items()}
    noted = shares.by_parameter(model)
    tensors: dict[str, Part] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for parameter, state in optimizer.state.items():
        assert isinstance(parameter, nn.Parameter)
        name, part = names[parameter], describe(parameter, noted.get(parameter))
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{name}{_SEPARATOR}{key}"] = _like(value, part)
            else:
                numbers.setdefault(name, {})[key] = value
    return tensors, numbers


def _saved_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters by the names that they are saved under."""
    saved_as = tied_names(model)
    return {saved_as.get(name, name): parameter for name, parameter in model.named_parameters()}


def _like(value: Tensor, part: Part) -> Part:
    """A tensor of the state: cut as its parameter is if it has its shape, else the same on every rank."""
    if local(value).shape == part.local.shape:
        return part.with_local(value)
    assert value.ndim == 0 or part.is_whole, "only a state of the parameter's own shape can be cut"
    return describe(value, None)


def describe_optimizer(optimizer: torch.optim.Optimizer, numbers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What is written as JSON, of all ranks (stages of a pipeline have other parameters); every rank must call."""
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    all_numbers: dict[str, dict[str, Any]] = {}
    all_groups: dict[Any, dict[str, Any]] = {}
    for theirs, their_groups in everyone((numbers, groups)):
        all_numbers |= theirs
        for place, group in enumerate(their_groups):
            all_groups.setdefault(group.get("name", place), group)
    return {"numbers": all_numbers, "groups": list(all_groups.values()), "class": type(optimizer).__name__}


def load_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, folder: Path, shares: Shares) -> None:
    """Restore in place what `gather_optimizer` collected; settings such as weight decay stay as the config has them.

    Each rank reads its own parts only. Every rank of a model that is split must call.

    Raises:
        CheckpointError: another kind of optimizer, or state of a parameter that the model does not have.
    """
    content = json.loads((folder / NUMBERS).read_text(encoding="utf-8"))
    if content["class"] != type(optimizer).__name__:
        raise CheckpointError(
            f"{folder}: holds the state of {content['class']}, this run uses {type(optimizer).__name__}. "
            "Set optim as it was, or start a new run from the checkpoint's weights."
        )
    parameters = _saved_parameters(model)
    known = set().union(*everyone(set(parameters)))
    noted = shares.by_parameter(model)
    host_scalars = {
        parameter
        for group in optimizer.param_groups
        for parameter in group["params"]
        if not (group.get("fused") or group.get("capturable"))
    }
    states: dict[Tensor, dict[str, Any]] = {}
    sharded = (folder / SHARDS).is_dir()
    file = ShardFiles(folder / SHARDS) if sharded else TensorFiles([folder / TENSORS])
    for entry in file.names:
        name, _, key = entry.rpartition(_SEPARATOR)
        if name not in known:
            raise CheckpointError(
                f"{folder / (SHARDS if sharded else TENSORS)}: has state for {name}, which this model does not have."
            )
        if name in parameters:
            parameter = parameters[name]
            place = torch.device("cpu") if parameter in host_scalars else parameter.device
            # An optimizer that keeps its state elsewhere than its parameter has it already; it is filled where it is.
            there = optimizer.state.get(parameter, {}).get(key)
            value = _restored(file, entry, parameter, noted.get(parameter), scalars_on=place, into=there)
            states.setdefault(parameter, {})[key] = value
    for name, entries in content["numbers"].items():
        if name in parameters:
            states.setdefault(parameters[name], {}).update(entries)
    for parameter, state in states.items():
        optimizer.state[parameter].update(state)
    _restore_groups(optimizer, content["groups"])


def _restored(
    file: Source,
    entry: str,
    parameter: nn.Parameter,
    share: Share | None,
    *,
    scalars_on: torch.device,
    into: Tensor | None,
) -> Tensor:
    """A tensor of the state: this rank's part of it if it is cut as its parameter is, else all of it.

    Args:
        scalars_on: where a single number belongs.
        into: the tensor to fill; None for a new one.
    """
    part, shape = describe(parameter, share), file.shape(entry)
    if shape == part.shape:
        value = torch.empty_like(parameter, dtype=file.dtype(entry), requires_grad=False) if into is None else into
        fill(part.with_local(value), file, entry)
        return value
    device = parameter.device if shape else scalars_on
    value = torch.empty(shape, dtype=file.dtype(entry), device=device) if into is None else into
    fill(describe(value, None), file, entry)
    return value


def _restore_groups(optimizer: torch.optim.Optimizer, saved: list[dict[str, Any]]) -> None:
    """Put the rates back, by the groups' names where they have one."""
    by_name = {group.get("name", place): group for place, group in enumerate(saved)}
    for place, group in enumerate(optimizer.param_groups):
        theirs = by_name[group.get("name", place)]
        group.update({key: value for key, value in theirs.items() if key == "lr" or key not in group})
