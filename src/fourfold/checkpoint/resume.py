"""Finding a checkpoint to resume and putting its weights back."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from fourfold.base.errors import CheckpointError
from fourfold.base.log import get_logger
from fourfold.checkpoint.folder import list_checkpoints, verify
from fourfold.models import pissa
from fourfold.parallel.sharded import copy_whole

log = get_logger(__name__)


def find_checkpoint(resume: bool | str, output_dir: Path) -> Path | None:
    """The checkpoint to resume.

    Args:
        resume: True for the newest of `output_dir`, or a folder's path.
    Returns:
        a verified folder, or None when `resume` is True and there is none yet.
    Raises:
        CheckpointError: the folder is damaged; names what is wrong and the checkpoint before it.
    """
    found = list_checkpoints(output_dir)
    if resume is True:
        if not found:
            return None
        folder = found[-1][1]
    else:
        folder = Path(str(resume))
        if not folder.is_dir():
            known = ", ".join(str(path) for _, path in found) or "none"
            raise CheckpointError(f"resume_from_checkpoint: {folder} does not exist. Checkpoints of this run: {known}.")
    try:
        verify(folder)
    except CheckpointError as error:
        raise CheckpointError(f"{error} {_offer_earlier(folder, [path for _, path in found])}") from error
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
def load_weights(model: nn.Module, folder: Path) -> None:
    """Put the weights of a checkpoint into a model that was built as at the run's start.

    Args:
        model: a PeftModel (adapter files are read) or a plain model (model files are read).
    Raises:
        CheckpointError: a trained weight is missing, or the file has one that the model does not.
    """
    if isinstance(model, PeftModel):
        path = folder / "adapter_model.safetensors"
        if not path.exists():
            raise CheckpointError(f"{path}: is missing; the checkpoint holds no adapter.")
        unexpected = _restore_adapter(model, load_file(path))
        if unexpected:
            raise CheckpointError(f"{path}: has weights that this adapter does not: {unexpected[:3]}.")
        return
    assert isinstance(model, PreTrainedModel)
    state, saved = model.state_dict(), _read_model(model, folder)
    tied: dict[int, list[str]] = {}  # one parameter under several names is saved under one of them
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(name)
    groups = [*tied.values(), *([name] for name in state.keys() - {name for names in tied.values() for name in names})]
    for names in groups:
        found = [name for name in names if name in saved]
        if not found:
            raise CheckpointError(f"{folder}: has no weights for {names[0]}.")
        copy_whole(state[found[0]], saved[found[0]])
    unknown = saved.keys() - state.keys()
    if unknown:
        raise CheckpointError(f"{folder}: has weights that this model does not: {sorted(unknown)[:3]}.")


def _restore_adapter(model: PeftModel, weights: dict[str, Tensor]) -> list[str]:
    """Put adapter weights back, also into sharded parameters; returns the names that the adapter does not have."""
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return pissa.restore(model, weights)
    # What PEFT would save is the parameters themselves, under the names of the file.
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    for name in own.keys() & weights.keys():
        copy_whole(own[name], weights[name])
    return sorted(weights.keys() - own.keys())


def _read_model(model: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    """The weights of a folder by the model's own names.

    Transformers writes some families (mixtures of experts) under the names of their published checkpoints; those
    are read by its own loader, at the price of a second copy in host memory. fp32 holds every dtype exactly.
    """
    loaded: dict[str, Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        loaded.update(load_file(path))
    if loaded.keys() <= model.state_dict().keys():
        return loaded
    return type(model).from_pretrained(folder, dtype=torch.float32).state_dict()
