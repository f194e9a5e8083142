"""Finding a checkpoint to resume and putting its weights back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from fourfold.base.errors import CheckpointError
from fourfold.base.log import get_logger
from fourfold.base.peft import PeftModel
from fourfold.checkpoint.folder import list_checkpoints, verify
from fourfold.models import pissa
from fourfold.models.composite import renamed_alone, whole_of
from fourfold.models.parameters import tied_names
from fourfold.models.published import Published
from fourfold.models.shard_files import WEIGHTS, ShardFiles, has_shards
from fourfold.models.tensor_files import HostTensors, NamedSource, Renamed, TensorFiles
from fourfold.models.unwrap import TunedModel, base_model
from fourfold.models.value_head import FILE as VALUE_HEAD_FILE
from fourfold.models.value_head import is_of_value_head, value_head_parts
from fourfold.models.weights import adapter_parts
from fourfold.parallel.shares import Shares
from fourfold.parallel.whole import Part, everyone, fill, parts_of

log = get_logger(__name__)


def check_named(resume: bool | str | None, output_dir: Path) -> None:
    """Refuse a checkpoint that is named and not there, before anything is loaded.

    Args:
        resume: as `find_checkpoint` has it.
    Raises:
        CheckpointError: lists the checkpoints that there are.
    """
    if isinstance(resume, str) and not Path(resume).is_dir():
        known = ", ".join(str(path) for _, path in list_checkpoints(output_dir)) or "none"
        raise CheckpointError(f"resume_from_checkpoint: {resume} does not exist. Checkpoints of this run: {known}.")


def named_checkpoint(resume: bool | str, output_dir: Path) -> Path | None:
    """The folder that `find_checkpoint` finds, unverified."""
    if resume is True:
        found = list_checkpoints(output_dir)
        return found[-1][1] if found else None
    check_named(resume, output_dir)
    return Path(str(resume))


def find_checkpoint(resume: bool | str, output_dir: Path, *, rank: int = 0, num_ranks: int = 1) -> Path | None:
    """The checkpoint to resume.

    Args:
        resume: True for the newest of `output_dir`, or a folder's path.
        rank, num_ranks: who calls; the ranks share the reading.
    Returns:
        a verified folder, or None when `resume` is True and there is none yet.
    Raises:
        CheckpointError: the folder is damaged; names what is wrong and the checkpoint before it.
    """
    folder = named_checkpoint(resume, output_dir)
    if folder is None:
        return None
    try:
        verify(folder, share=rank, of=num_ranks)
    except CheckpointError as error:
        known = [path for _, path in list_checkpoints(output_dir)]
        raise CheckpointError(f"{error} {_offer_earlier(folder, known)}") from error
    return folder


def _offer_earlier(damaged: Path, folders: list[Path]) -> str:
    names = [path.name for path in folders]
    earlier = folders[: names.index(damaged.name)] if damaged.name in names else folders
    for folder in reversed(earlier):
        try:
            verify(folder)
        except CheckpointError:
            continue
        return f"The one before it is whole: resume_from_checkpoint={folder}."
    return "No earlier checkpoint is whole; start again with overwrite_output_dir=true."


@torch.no_grad()
def load_weights(model: nn.Module, folder: Path, shares: Shares) -> None:
    """Put the weights of a checkpoint into a model that was built as at the run's start.

    Each rank reads its own parts only. Every rank of a model that is split must call.

    Args:
        model: a PeftModel (adapter files are read) or a plain model (model files are read).
        shares: which of the model's parameters are parts of larger ones.
    Raises:
        CheckpointError: a trained weight is missing, or the file has one that the model does not.
    """
    assert isinstance(model, PreTrainedModel | PeftModel)
    _load_value_head(model, folder, shares)
    if isinstance(model, PeftModel):
        path = folder / "adapter_model.safetensors"
        if not path.exists():
            raise CheckpointError(f"{path}: is missing; the checkpoint holds no adapter.")
        is_part = whole_of(base_model(model)) is not None
        if pissa.is_pissa(model):
            saved = load_file(path)
            unexpected = pissa.restore(model, renamed_alone(saved) if is_part else saved)
            if unexpected:
                raise CheckpointError(f"{path}: has weights that this adapter does not: {unexpected[:3]}.")
        else:
            parts = {name: (part, [name]) for name, part in adapter_parts(model, shares).items()}
            files: NamedSource = TensorFiles([path])
            if is_part:
                files = Renamed(files, renamed_alone({name: name for name in files.names}))
            _load_parts(parts, files, path)
        return
    parts: dict[str, tuple[Part, list[str]]] = {}
    first: dict[int, str] = {}  # one parameter under several names is saved under one of them
    own, saved_as = dict(model.named_parameters(remove_duplicate=False)), tied_names(model)
    for name, part in parts_of(model, shares).items():
        if is_of_value_head(name):
            continue
        key = first.setdefault(id(own.get(name, part)), name)
        parts.setdefault(key, (part, []))[1].extend([name, saved_as.get(name, name)])
    _load_parts(parts, _read_model(model, folder), folder)


def _load_value_head(model: TunedModel, folder: Path, shares: Shares) -> None:
    parts = value_head_parts(model, shares)
    if not any(everyone(bool(parts))):
        return
    path = folder / VALUE_HEAD_FILE
    if not path.exists():
        raise CheckpointError(f"{path}: is missing; the checkpoint holds no reward model.")
    _load_parts({name: (part, [name]) for name, part in parts.items()}, TensorFiles([path]), path)


def _load_parts(parts: Mapping[str, tuple[Part, list[str]]], source: NamedSource, place: Path) -> None:
    """Fill each part from the first of its names that the source has."""
    for name, (part, names) in parts.items():
        found = [candidate for candidate in names if candidate in source]
        if not found:
            raise CheckpointError(f"{place}: has no weights for {name}.")
        try:
            fill(part, source, found[0])
        except ValueError as error:
            raise CheckpointError(f"{place}: {error}.") from error
    known = set().union(*everyone({name for _, names in parts.values() for name in names}))
    unknown = sorted(set(source.names) - known)
    if unknown:
        raise CheckpointError(f"{place}: has weights that this model does not: {unknown[:3]}.")


def _read_model(model: PreTrainedModel, folder: Path) -> NamedSource:
    """The weights of a folder by the model's own names.

    Transformers writes some families (mixtures of experts) under the names of their published checkpoints; those
    are read by its own loader, at the price of a second copy in host memory. fp32 holds every dtype exactly.
    """
    if has_shards(folder):
        return ShardFiles(folder / WEIGHTS)
    files = TensorFiles(sorted(folder.glob("model*.safetensors")))
    if whole_of(model) is not None:
        return Published(files, model, is_part=True)
    if set(files.names) <= model.state_dict().keys():
        return files
    return HostTensors(type(model).from_pretrained(folder, dtype=torch.float32).state_dict())
