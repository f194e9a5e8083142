"""Finding a checkpoint to resume and putting its weights back."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from fourfold.base.errors import CheckpointError
from fourfold.base.log import get_logger
from fourfold.checkpoint.folder import list_checkpoints, verify
from fourfold.models import pissa

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
        unexpected = pissa.restore(model, load_file(path))
        if unexpected:
            raise CheckpointError(f"{path}: has weights that this adapter does not: {unexpected[:3]}.")
        return
    loaded: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        loaded.update(load_file(path))
    state = model.state_dict()
    owners: dict[int, list[str]] = {}
    for name, tensor in state.items():
        owners.setdefault(tensor.data_ptr(), []).append(name)
    for names in owners.values():
        name = next((n for n in names if n in loaded), None)
        if name is None:
            raise CheckpointError(f"{folder}: has no weights for {names[0]}.")
        for alias in names:
            loaded_tensor = loaded.pop(alias, None)
            if loaded_tensor is not None:
                state[alias].copy_(loaded_tensor)
    if loaded:
        raise CheckpointError(f"{folder}: has weights that this model does not: {list(loaded)[:3]}.")
