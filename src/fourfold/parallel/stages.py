"""Cutting a model into pipeline stages, in place: what a rank does not own is dropped, names stay as they were.

The forward pass stays Transformers' own: a layer of another stage becomes a `Skip`, which has no parameters and hands
on what it gets, so `layers.7` stays `layers.7` and masks, rotary tables and kinds of layers are found as before. A
rank that runs two stages (planning/stages.py) keeps the layers of both in the one tree; which of them a call runs is
set for the duration of the call (`Part.running`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from fourfold.base.errors import PlanError
from fourfold.families.decoder import decoder_of, stage_names
from fourfold.parallel.mesh import Mesh
from fourfold.parallel.shares import Share, Shares
from fourfold.planning.stages import num_stages, stage_layers, stages_of_rank

_SCALES = ("embedding_multiplier", "embedding_scale")
"""Attributes of decoders (granite, hyperclovax, hrm) by which `forward` multiplies embeddings; only one stage may."""

VALUE_HEAD = "v_head"
"""Name of the child that reads values from the last hidden states, where a model has one (models/value_head.py)."""


def value_head_of(root: nn.Module) -> nn.Module | None:
    """A model's value head; None if it has none, or if another stage of a pipeline has it."""
    return dict(root.named_children()).get(VALUE_HEAD)


class Skip(nn.Module):
    """In place of a layer of another stage, or of the last norm: returns its first argument.

    Attributes:
        attention_type: of the layer it stands for; some decoders choose a mask by it.
    """

    def __init__(self, attention_type: str | None = None) -> None:
        super().__init__()
        if attention_type is not None:
            self.attention_type = attention_type

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """hidden_states as they are."""
        return hidden_states


class StagedLayers(nn.ModuleList):
    """A decoder's layers; those outside `running` are skipped when the decoder goes through them."""

    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__(layers)
        self._skips = [Skip(getattr(layer, "attention_type", None)) for layer in layers]
        self.running = range(len(layers))

    def drop(self, kept: set[int]) -> None:
        """Free every layer that is not kept."""
        for number in set(range(len(self))) - kept:
            self[number] = self._skips[number]

    def __iter__(self) -> Iterator[nn.Module]:
        for number in range(len(self)):
            yield super().__getitem__(number) if number in self.running else self._skips[number]  # type: ignore[misc]

    def __getitem__(self, index: Any) -> Any:
        # Decoders loop over a slice of their layers.
        return list(self)[index] if isinstance(index, slice) else super().__getitem__(index)


class Part:
    """One stage of a rank.

    Attributes:
        index: of all stages.
        layers: which of the model's layers it runs.
        is_first, is_last: whether it embeds the tokens, and whether it ends in norm and head.
        dtype: of the hidden states that it sends and receives.
    """

    def __init__(self, index: int, layers: range, total: int, dtype: torch.dtype, tree: _Tree) -> None:
        self.index, self.layers, self.dtype = index, layers, dtype
        self.is_first, self.is_last = index == 0, index == total - 1
        self._tree = tree

    def blocks(self) -> list[nn.Module]:
        """Its layers."""
        return [self._tree.layers[number] for number in self.layers]

    def modules(self) -> list[nn.Module]:
        """What this stage computes with: its layers, and embedding, norm and head where it has them."""
        return [
            *self.blocks(),
            *(self._tree.first if self.is_first else ()),
            *(self._tree.last if self.is_last else ()),
        ]

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within it, a call of the model runs this stage alone."""
        tree = self._tree
        everything = tree.layers.running
        tree.layers.running = self.layers
        if not self.is_last:
            setattr(tree.decoder, tree.norm_name, tree.skip)
        if not self.is_first:
            for name in tree.scales:
                setattr(tree.decoder, name, 1.0)
        try:
            yield
        finally:
            tree.layers.running = everything
            setattr(tree.decoder, tree.norm_name, tree.norm)
            for name, value in tree.scales.items():
                setattr(tree.decoder, name, value)


@dataclass
class _Tree:
    """The places of a decoder that a cut changes.

    Attributes:
        scales: of the embeddings in the decoder's forward pass, by name.
        first, last: the modules before and after the layers.
    """

    decoder: nn.Module
    layers: StagedLayers
    norm_name: str
    norm: nn.Module
    scales: dict[str, float]
    first: tuple[nn.Module, ...]
    last: tuple[nn.Module, ...]
    skip: Skip


@dataclass(frozen=True)
class StageCut:
    """What a rank has of a pipeline.

    Attributes:
        parts: its stages, in rising order.
        num_stages: of the whole pipeline.
        hidden_size, dtype: of the hidden states between stages.
        tied: ranks that hold the embedding which is also the head, where they are two; None otherwise.
    """

    parts: tuple[Part, ...]
    num_stages: int
    hidden_size: int
    dtype: torch.dtype
    tied: dist.ProcessGroup | None


def cut_stages(root: PreTrainedModel, mesh: Mesh, compute: torch.dtype | None) -> StageCut:
    """Keep, in place, what this rank's stages need of a causal language model.

    Args:
        compute: dtype of the computation where it differs from that of the parameters.
    Raises:
        PlanError: a model whose forward pass is more than embedding, layers, norm and head.
    """
    layout = mesh.layout
    decoder = decoder_of(root)
    assert isinstance(decoder, nn.Module)
    embed_name, layers_name, norm_name = _places(root, decoder)
    embedding = root.get_input_embeddings()
    assert isinstance(embedding, nn.Module)
    first_weight = next(embedding.parameters())
    head = root.get_output_embeddings()
    is_tied = head is not None and any(weight is first_weight for weight in head.parameters())
    original = getattr(decoder, layers_name)
    layers = StagedLayers(original)
    setattr(decoder, layers_name, layers)
    scales = {name: float(getattr(decoder, name)) for name in _SCALES if name in vars(decoder)}
    norm = getattr(decoder, norm_name)
    last = tuple(module for module in (norm, head, value_head_of(root)) if module is not None)
    tree = _Tree(decoder, layers, norm_name, norm, scales, (embedding,), last, Skip())
    total = num_stages(layout)
    ranges = stage_layers(layout, len(layers))
    dtype = first_weight.dtype if compute is None else compute
    parts = tuple(Part(i, ranges[i], total, dtype, tree) for i in stages_of_rank(layout, mesh.index("pp")))
    has_first, has_last = any(part.is_first for part in parts), any(part.is_last for part in parts)
    _refuse_what_changes_hidden_states(root, Part(1, range(0), total + 1, dtype, tree), first_weight)
    layers.drop({number for part in parts for number in part.layers})
    if not has_last:
        tree.norm, tree.last = tree.skip, ()
        setattr(decoder, norm_name, tree.skip)
        root.set_output_embeddings(None)  # type: ignore[arg-type]
        if value_head_of(root) is not None:
            setattr(root, VALUE_HEAD, None)
    if not has_first:
        tree.first = ()
        if not (is_tied and has_last):
            setattr(decoder, embed_name, None)
    alone = has_first and has_last
    tied = mesh.new_pipeline_group((0, layout.pp - 1)) if is_tied and layout.pp_schedule != "zbv" else None
    return StageCut(parts, total, first_weight.shape[1], dtype, tied if (has_first or has_last) and not alone else None)


def note_tied(shares: Shares, root: PreTrainedModel, cut: StageCut) -> None:
    """Note that two stages hold the embedding, so that its gradient is summed and counted once."""
    if cut.tied is None:
        return
    embedding = root.get_input_embeddings()
    assert isinstance(embedding, nn.Module)
    for name, weight in embedding.named_parameters(recurse=False):
        known = shares.get(embedding, name) or Share(tuple(weight.shape))
        shares.put(embedding, name, replace(known, stages=2, sum_over=cut.tied))


def _places(root: PreTrainedModel, decoder: nn.Module) -> tuple[str, str, str]:
    """The names of embedding, layers and norm in a decoder, from the family's own pipeline plan.

    Raises:
        PlanError: there is none, or parameters lie elsewhere.
    """
    kind = root.config.model_type
    names = stage_names(decoder)
    if names is None:
        raise PlanError(
            f"parallel.pp: {kind} models are not known to be cut into stages (embedding, layers, norm). "
            "Use tp or dp_shard."
        )
    known = {id(p) for name in names for p in getattr(decoder, name).parameters()}
    for head in (root.get_output_embeddings(), value_head_of(root)):
        known |= {id(p) for p in head.parameters()} if head is not None else set()
    elsewhere = [name for name, parameter in root.named_parameters() if id(parameter) not in known]
    if elsewhere:
        raise PlanError(
            f"parallel.pp: {kind} has weights outside embedding, layers, norm and head ({elsewhere[0]}), which no "
            "stage would own. Use tp or dp_shard."
        )
    return names


@torch.no_grad()
def _refuse_what_changes_hidden_states(root: PreTrainedModel, nothing: Part, like: Tensor) -> None:
    """Refuse a decoder whose `forward` does something to its input beside running layers.

    A stage without layers must return what it received, to the bit: a family that scales or normalises the embeddings
    there would do so again at every stage.

    Raises:
        PlanError: it does.
    """
    device = torch.device("cpu") if like.is_meta else like.device  # without weights, buffers are on the host
    received = torch.linspace(-1, 1, 2 * like.shape[1], device=device, dtype=like.dtype).view(1, 2, -1)
    decoder = decoder_of(root)
    with nothing.running():
        returned = decoder(inputs_embeds=received, use_cache=False).last_hidden_state
    if not torch.equal(received, returned):
        raise PlanError(
            f"parallel.pp: the forward pass of {root.config.model_type} changes hidden states outside its layers (it "
            "scales its embeddings, say), which every stage would repeat. Use tp or dp_shard."
        )
