"""Tensor parallelism: every matrix of a layer is shared by the ranks of a group.

Which matrix is cut by rows of its output and which by columns of its input is what the model's own `tp_plan` says
(Transformers). A *region* is a child of a decoder layer that has matrices: attention, MLP, experts. Its input is the
same on all ranks; within it each rank works with its own heads or channels, and what comes out are partial sums, added
up once. Gradients of what all ranks hold whole inside a region (norms of heads, low-rank adapters' inner sides,
routers) are partial sums likewise, and are added up once a step.

With sequence parallelism the positions are shared between regions, too: norms and residuals exist once over all ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from fourfold.base.errors import PlanError
from fourfold.base.peft import LoraLayer
from fourfold.families.decoder import key_heads_of
from fourfold.families.tensor_styles import GATHERS, LINEAR_STYLES, ROUTES, styles_of
from fourfold.families.tensor_styles import TENSOR_FAMILIES as FAMILIES
from fourfold.parallel import exchange
from fourfold.parallel.linear import cut_adapters_of_experts, cut_linear
from fourfold.parallel.shares import Cut, Share, Shares
from fourfold.parallel.vocabulary import VocabularyShare, share_embedding

_SEQUENCE = 1
"""Dimension of the positions in hidden states [B, S, hidden size]."""


def _positions(hidden: Tensor) -> int:
    """The dimension of the positions in hidden states, [B, S, hidden size] or [B S, hidden size]."""
    return _SEQUENCE if hidden.ndim > 2 else 0


@dataclass(frozen=True, slots=True)
class TensorSplit:
    """What the rest must know of a model whose matrices are shared.

    Attributes:
        vocabulary: this rank's tokens of the head's logits; None if the logits are whole.
        router_copies: how many ranks compute the same router loss, whose gradients are then added up.
    """

    vocabulary: VocabularyShare | None
    router_copies: int


def share_tensors(
    root: PreTrainedModel,
    runs: Sequence[Sequence[nn.Module]],
    mesh: DeviceMesh,
    shares: Shares,
    *,
    sequence: bool,
    loss: bool,
    vocabulary: int | None = None,
) -> TensorSplit:
    """Keep this rank's part of every matrix, in place.

    Args:
        root: the model, possibly with PEFT's layers in it; parameters may be on the meta device.
        runs: the decoder layers that this rank runs, in order; one list for each time that it takes up and hands on
            hidden states, as often as it has stages of a pipeline.
        mesh: one-dimensional: the tensor-parallel ranks, which are neighbours in the job.
        shares: gets a note of every parameter that is cut, or whose gradient is a partial sum.
        sequence: share the positions between regions.
        loss: leave the logits shared.
        vocabulary: cut a shared vocabulary as if it had so many tokens, so that each rank has the same ones as of
            another model with so many; tokens beyond them are left out. None for the model's own.
    Raises:
        PlanError: the family, a layer's kind or its size cannot be shared.
    """
    model_type = root.config.get_text_config().model_type
    if model_type not in FAMILIES:
        raise PlanError(not_shared(model_type))
    return _Sharer(root, mesh, shares, sequence=sequence, loss=loss, vocabulary=vocabulary).run(runs)


def not_shared(model_type: str) -> str:
    """Why a family is refused, and what can be used instead."""
    return (
        f"parallel.tp: {model_type} models are not known to train right with shared matrices. Use dp_shard (FSDP), "
        f"or one of: {', '.join(FAMILIES)}."
    )


def even_range(total: int, index: int, count: int) -> tuple[int, int]:
    """[start, stop) of part `index` of `count` parts whose sizes differ by at most one."""
    return index * total // count, (index + 1) * total // count


def _regions(block: nn.Module) -> Iterator[nn.Module]:
    for child in block.children():
        if any(parameter.ndim > 1 for parameter in child.parameters()):
            yield child


class _Sharer:
    def __init__(
        self,
        root: PreTrainedModel,
        mesh: DeviceMesh,
        shares: Shares,
        *,
        sequence: bool,
        loss: bool,
        vocabulary: int | None,
    ) -> None:
        config = root.config.get_text_config()
        self._root, self._shares, self._sequence, self._loss = root, shares, sequence, loss
        self._vocabulary = vocabulary if loss else None
        self._group, self._rank, self._size = mesh.get_group(), mesh.get_local_rank(), mesh.size()
        self._styles = styles_of(root)
        self._heads: int = config.num_attention_heads
        self._kv_replicas = {count: _replicas(mesh, count) for count in key_heads_of(config)}
        self._kv_heads = max(self._kv_replicas)
        self._cut: set[tuple[nn.Module, str]] = set()

    def run(self, runs: Sequence[Sequence[nn.Module]]) -> TensorSplit:
        vocabulary = self._share_vocabulary()
        names = {module: name for name, module in self._root.named_modules()}
        router_copies = 1
        for block in itertools.chain.from_iterable(runs):
            for region in _regions(block):
                split = self._share_region(region, names[region])
                has_experts = any(parameter.ndim == 3 for parameter in region.parameters())
                if has_experts and (split or self._sequence):
                    router_copies = self._size
            if self._sequence:
                self._note_partial(block)
                if getattr(block, "hidden_size_per_layer_input", None):
                    block.register_forward_pre_hook(self._take_per_layer_input)
        for blocks in runs if self._sequence else ():
            blocks[0].register_forward_pre_hook(self._enter_blocks, with_kwargs=True, prepend=True)
            blocks[-1].register_forward_hook(self._leave_blocks)
        return TensorSplit(vocabulary, router_copies)

    def _style(self, name: str) -> str | None:
        return next((style for pattern, style in self._styles if pattern.fullmatch(name)), None)

    # What is cut.

    def _share_region(self, region: nn.Module, name: str) -> bool:
        """Cut a region's matrices and exchange at its borders; returns whether any was cut."""
        if self._style(name) == ROUTES:
            self._note_partial(region)
            region.register_forward_pre_hook(self._enter_region, with_kwargs=True, prepend=True)
            return False
        found: dict[str, str] = {}
        kv_heads = self._kv_heads_of(region)
        for child_name, child in region.named_modules():
            path = f"{name}.{child_name}" if child_name else name
            if (style := self._style(path)) in LINEAR_STYLES:
                self._share_linear(child, path, style, kv_heads)
                found[child_name] = style
            for parameter in [name for name, _ in child.named_parameters(recurse=False)]:
                # PEFT's wrappers of stacked experts lie between the names
                if (style := self._style(f"{path.replace('.base_layer', '')}.{parameter}")) is not None:
                    self._share_stacked(region, child, parameter, style)
                    found[f"{child_name}.{parameter}"] = style
        split = bool(found)
        if found.get("o_proj") == "rowwise":
            self._settle_heads(region, kv_heads)
        if split:
            self._note_partial(region)
        if split or (self._sequence and not isinstance(region, nn.Linear | LoraLayer)):  # one needs its own positions
            region.register_forward_pre_hook(self._enter_region, with_kwargs=True, prepend=True)
            region.register_forward_hook(self._leave_split_region if split else self._leave_whole_region)
        return split

    def _share_linear(self, layer: nn.Module, name: str, style: str, kv_heads: int) -> None:
        dim = 0 if style.startswith("colwise") else 1
        total = _features(layer, dim)
        kind = name.rsplit(".", 1)[-1]
        if style == "colwise" and kind in ("k_proj", "v_proj") and self._size > kv_heads:
            index = self._rank * kv_heads // self._size
            cut = Cut(0, (even_range(total, index, kv_heads),))
            note = Share((), parts=kv_heads, sum_over=self._kv_replicas[kv_heads])
        else:
            cut = Cut(dim, (even_range(total, self._rank, self._size),))
            note = Share((), parts=self._size)
        if style in (GATHERS, "rowwise_split_input") and total % self._size:
            raise PlanError(
                f"parallel.tp: {self._size} does not divide the {total} features of {name}. Use a size that does."
            )
        for owner, parameter, part in cut_linear(layer, name, cut, copies=self._size):
            self._put(owner, parameter, part, note)
        if style == GATHERS:
            layer.register_forward_hook(self._gather_features)
        elif style == "rowwise_split_input":
            layer.register_forward_pre_hook(_TakeFeatures(cut))

    def _share_stacked(self, region: nn.Module, module: nn.Module, name: str, style: str) -> None:
        """Stacked experts [E, out, in] with their adapters, or one number a head."""
        parameter = getattr(module, name)
        assert isinstance(parameter, nn.Parameter)
        dim = {"colwise": 0, "packed_colwise": parameter.ndim - 2, "rowwise": parameter.ndim - 1}.get(style)
        if dim is None:
            raise PlanError(f"parallel.tp: a parameter of style {style} cannot be shared. Use parallel.tp: 1.")
        total, fused = parameter.shape[dim], 2 if style == "packed_colwise" else 1
        start, stop = even_range(total // fused, self._rank, self._size)
        cut = Cut(dim, tuple((part * total // fused + start, part * total // fused + stop) for part in range(fused)))
        part = nn.Parameter(cut.take(parameter.data), requires_grad=parameter.requires_grad)
        shape = tuple(parameter.shape)
        setattr(module, name, part)
        note = Share((), parts=self._size)
        self._put(module, name, (shape, cut), note)
        if part.ndim == 3:
            for owner, adapter, cut_part in cut_adapters_of_experts(region, module, name, cut):
                self._put(owner, adapter, cut_part, note)

    def _put(self, module: nn.Module, name: str, part: tuple[tuple[int, ...], Cut], note: Share) -> None:
        """Note a cut, on top of what expert parallelism may have cut before."""
        shape, cut = part
        before = self._shares.get(module, name)
        if before is not None:
            shape = before.shape
            note = replace(note, cuts=before.cuts, parts=before.parts * note.parts)
        self._shares.put(module, name, replace(note, shape=shape, cuts=(*note.cuts, cut)))
        self._cut.add((module, name))

    def _note_partial(self, module: nn.Module) -> None:
        """Everything in a module that is not cut gets its gradient in partial sums."""
        for owner in module.modules():
            for name, parameter in owner.named_parameters(recurse=False):
                if (owner, name) in self._cut:
                    continue
                before = self._shares.get(owner, name) or Share(tuple(parameter.shape))
                self._shares.put(owner, name, replace(before, sum_over=self._group))

    def _kv_heads_of(self, region: nn.Module) -> int:
        """The key heads of an attention layer, whole; of another region those of the model's config."""
        groups = getattr(region, "num_key_value_groups", None)
        found = self._heads // groups if isinstance(groups, int) else self._kv_heads
        return found if found in self._kv_replicas else self._kv_heads

    def _settle_heads(self, attention: nn.Module, kv_heads: int) -> None:
        """Tell an attention layer how many of its query heads share a key head on this rank."""
        own = max(kv_heads // self._size, 1)
        if isinstance(getattr(attention, "num_key_value_groups", None), int):
            attention.num_key_value_groups = self._heads // self._size // own  # type: ignore[assignment]

    # Embedding and head.

    def _share_vocabulary(self) -> VocabularyShare | None:
        embedding, head = self._root.get_input_embeddings(), self._root.get_output_embeddings()
        if not isinstance(embedding, nn.Embedding | None):
            raise PlanError(
                "parallel.tp: an embedding with an adapter, or trained beside one, cannot be shared. "
                "Leave it out of lora_target and additional_target."
            )
        total = self._root.config.get_text_config().vocab_size if embedding is None else embedding.weight.shape[0]
        if head is not None:
            total = _features(head, 0)
        start, stop = even_range(self._vocabulary or total, self._rank, self._size)
        stop = min(stop, total)
        if start >= stop:
            raise PlanError(
                f"parallel.tp: {self._size} ranks share {self._vocabulary} tokens, and this model has {total}, so that "
                "one would have none. Use fewer tp ranks."
            )
        share, cut = VocabularyShare(start, stop, self._group), Cut(0, ((start, stop),))
        tied = embedding is not None and head is not None and getattr(head, "weight", None) is embedding.weight
        note = Share((), parts=self._size)
        if embedding is not None:
            weight = embedding.weight
            shape = tuple(weight.shape)
            embedding.weight = nn.Parameter(cut.take(weight.data), requires_grad=weight.requires_grad)
            embedding.num_embeddings = stop - start
            self._put(embedding, "weight", (shape, cut), note)
            share_embedding(embedding, share)
            if tied:
                assert isinstance(head, nn.Linear)
                head.weight, head.out_features = embedding.weight, stop - start
                self._put(head, "weight", (shape, cut), note)
        if head is None:
            return None
        if not tied:
            for owner, parameter, part in cut_linear(head, "lm_head", cut, copies=self._size):
                self._put(owner, parameter, part, note)
        head.register_forward_pre_hook(self._enter_head)
        if self._loss:
            return share
        if total % self._size:
            raise PlanError(
                f"parallel.loss_parallel: false needs a vocabulary that {self._size} tp ranks can divide, and it is "
                f"{total}. Leave loss_parallel out."
            )
        head.register_forward_hook(self._join_logits)
        return None

    # What is exchanged.

    def _enter_region(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self._sequence:
            return _on_hidden(args, kwargs, lambda x: exchange.gather(x, _positions(x), self._group))
        return _on_hidden(args, kwargs, lambda x: exchange.copy(x, self._group))

    def _leave_split_region(self, module: nn.Module, args: object, output: Any) -> Any:
        if self._sequence:
            return _on_output(output, lambda x: exchange.reduce_scatter(x, _positions(x), self._group))
        return _on_output(output, lambda x: exchange.reduce(x, self._group))

    def _leave_whole_region(self, module: nn.Module, args: object, output: Any) -> Any:
        """All ranks have computed the same; with shared positions each goes on with its own."""
        return _on_output(output, lambda x: x.chunk(self._size, _SEQUENCE)[self._rank])

    def _take_per_layer_input(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """What a layer of gemma4 is given beside hidden states [B, S, ...] is made for all positions."""
        hidden, own, *others = args
        return (hidden, exchange.split(own, _SEQUENCE, self._group), *others)

    def _enter_blocks(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return _on_hidden(args, kwargs, lambda x: exchange.split(x, _SEQUENCE, self._group))

    def _leave_blocks(self, module: nn.Module, args: object, output: Any) -> Any:
        return _on_output(output, lambda x: exchange.join(x, _SEQUENCE, self._group))

    def _gather_features(self, module: nn.Module, args: object, output: Tensor) -> Tensor:
        return exchange.gather(output, output.ndim - 1, self._group)

    def _enter_head(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (exchange.copy(args[0], self._group), *args[1:])

    def _join_logits(self, module: nn.Module, args: object, output: Tensor) -> Tensor:
        return exchange.join(output, output.ndim - 1, self._group)


class _TakeFeatures:
    """Gives a layer its features of a whole input."""

    def __init__(self, cut: Cut) -> None:
        ((self._start, stop),) = cut.ranges
        self._size = stop - self._start

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0].narrow(-1, self._start, self._size), *args[1:])


def _on_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[Tensor], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Change the hidden states that a module is called with, by position or by name."""
    if args:
        return (change(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}


def _on_output(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Change the hidden states that a module returns, alone or first of several."""
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)


def _features(layer: nn.Module, dim: int) -> int:
    """Output (0) or input (1) features of a linear layer, also of an adapted or packed one."""
    features = layer.out_features if dim == 0 else layer.in_features
    assert isinstance(features, int)
    return features


def _replicas(mesh: DeviceMesh, kv_heads: int) -> dist.ProcessGroup | None:
    """The ranks that hold the same key head, where there are more ranks than key heads; every rank must call."""
    if mesh.size() <= kv_heads:
        return None
    copies = mesh.size() // kv_heads
    heads = [list(range(start, start + copies)) for start in range(0, dist.get_world_size(), copies)]
    ranks = [heads[start : start + kv_heads] for start in range(0, len(heads), kv_heads)]
    return DeviceMesh(mesh.device_type, ranks, mesh_dim_names=("tp_groups", "kv_head", "kv_copy")).get_group("kv_copy")
