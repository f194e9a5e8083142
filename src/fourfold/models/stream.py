"""Weights that go from their files straight to where they are used.

The model is built without weights, on the meta device, and split; then each rank reads its own parts. So no rank ever
has the whole model in memory, nor a whole matrix where matrices are shared.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from fourfold.base.log import get_logger
from fourfold.config.model import ModelConfig
from fourfold.config.tuning import TuningConfig
from fourfold.models.composite import whole_config
from fourfold.models.published import Published, UnknownConversionError
from fourfold.models.shard_files import WEIGHTS, ShardFiles, has_shards
from fourfold.models.source import gguf_path, hub_options, model_name, weight_files
from fourfold.models.tensor_files import NamedSource, TensorFiles
from fourfold.models.unwrap import TunedModel, base_model
from fourfold.models.vocabulary import grows_vocabulary
from fourfold.parallel.shares import Shares
from fourfold.parallel.whole import fill, parts_of

log = get_logger(__name__)

_BASE = ".base_layer"


@dataclass(frozen=True, slots=True)
class Stream:
    """The weights of a model that was built without them.

    Attributes:
        source: the weights, by the model's names.
    """

    source: NamedSource

    def fill(self, module: TunedModel, device: torch.device, shares: Shares, *, on_host: bool = False) -> None:
        """Read this rank's part of everything that has no weights yet, in place; optimizers are to be made afterwards.

        Args:
            module: the model, split or not, perhaps with adapters, whose weights are there.
            device: where the model computes.
            shares: which of its parameters are parts of larger ones.
            on_host: keep the parameters in host memory all the same.
        """
        inner = base_model(module)
        empty = {name for name, p in inner.named_parameters(remove_duplicate=False) if p.is_meta}
        adapters = {name for name, _ in inner.named_parameters(remove_duplicate=False)} - empty
        materialize(module, device, on_host=on_host)
        tied = _other_names(inner)
        for name, part in parts_of(inner, shares).items():
            if name in adapters:
                continue
            known = name.replace(_BASE, "")
            saved = next(candidate for candidate in (known, *tied.get(known, ())) if candidate in self.source)
            fill(part, self.source, saved)


def _other_names(model: PreTrainedModel) -> dict[str, list[str]]:
    """The names that a tied parameter may be saved under, by each of them."""
    others: dict[str, list[str]] = {}
    for one, other in model.all_tied_weights_keys.items():
        others.setdefault(one, []).append(other)
        others.setdefault(other, []).append(one)
    return others


def materialize(module: nn.Module, device: torch.device, *, on_host: bool = False) -> None:
    """Give what is on the meta device memory, with any numbers, and move the rest to `device`.

    Args:
        on_host: keep the parameters in host memory.
    """
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((owner, name))
    place = torch.device("cpu") if on_host else device

    def placed(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device=place) if tensor.is_meta else tensor.to(place)

    module._apply(placed)  # as `to_empty` does, which would lose what is there; FSDP knows of it
    for (first, first_name), *others in owners.values():
        for owner, name in others:  # what was tied is to stay so
            setattr(owner, name, getattr(first, first_name))
    for owner in module.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            owner._buffers[name] = buffer.to(device)


def why_not_streamed(config: ModelConfig, tuning: TuningConfig, model_config: PreTrainedConfig) -> str | None:
    """What of a run needs the whole weights in memory; None if nothing does."""
    own = model_config.to_dict().get("quantization_config")
    merged = config.adapter_name_or_path if tuning.create_new_adapter else config.adapter_name_or_path[:-1]
    reasons = {
        "train_from_scratch makes the weights": config.train_from_scratch,
        "the weights are quantised": own is not None or config.quantization_bit is not None,
        "a GGUF file is converted as a whole": gguf_path(model_name(config)) is not None,
        "the vocabulary grows": grows_vocabulary(config),
        "an adapter is merged first": bool(merged),
        "use_dora starts from the weights": tuning.use_dora,
        "pissa_init starts from the weights": tuning.pissa_init,
        "additional_target copies weights": bool(tuning.additional_target),
    }
    return next((reason for reason, given in reasons.items() if given), None)


def open_weights(config: ModelConfig, model: PreTrainedModel, dtype: torch.dtype) -> NamedSource | str:
    """The weights of a checkpoint by the names of `model`, or why they cannot be read so."""
    if dtype != torch.float32 and (model._keep_in_fp32_modules or model._keep_in_fp32_modules_strict):
        return "some layers of this family are kept in fp32"
    name = model_name(config)
    folder = Path(name).expanduser()
    if has_shards(folder):
        source: NamedSource = ShardFiles(folder / WEIGHTS)
        unused: list[str] = []
    else:
        try:
            part = whole_config(name, **hub_options(config)) is not None
            source = Published(TensorFiles(weight_files(config)), model, is_part=part)
        except UnknownConversionError as error:
            return f"{error} is converted in a way of its own"
        except OSError:
            return "there are no safetensors files"
        unused = source.unused
    tied = _other_names(model)
    for own, tensor in model.state_dict().items():
        saved = next((candidate for candidate in (own, *tied.get(own, ())) if candidate in source), None)
        if saved is None:
            return f"the checkpoint has no {own}"
        if source.shape(saved) != tuple(tensor.shape):
            return f"{own} has another shape in the checkpoint"
    if unused:
        log.warning("model_name_or_path: %d tensors of %s are not used, e.g. %s.", len(unused), name, unused[0])
    return source


def load_generation_config(config: ModelConfig, model: PreTrainedModel) -> None:
    """Give the model the generation config that is published with it, as `from_pretrained` does."""
    try:
        options = {key: value for key, value in hub_options(config).items() if key != "trust_remote_code"}
        model.generation_config = GenerationConfig.from_pretrained(model_name(config), **options)
    except OSError:
        pass  # there is none; the model has made one from its own config
