"""parallelize(): the only place where a model is split, top to bottom in the only order that works."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from fourfold.base.errors import PlanError
from fourfold.base.log import get_logger
from fourfold.dataset.batch import Batch
from fourfold.parallel.context import ContextParallel, share_positions
from fourfold.parallel.expert import check_experts, split_experts
from fourfold.parallel.expert_load import ExpertLoad
from fourfold.parallel.fsdp import shard
from fourfold.parallel.gradients import DdpSync, FsdpSync, GradientSync, NoSync, replicate
from fourfold.parallel.mesh import Mesh
from fourfold.parallel.pipeline import FsdpOnceAStep, NoStepSync, Pipeline, StepSync, SumOverReplicas
from fourfold.parallel.reduce import GradientNorm, Reducer, Spread, gradient_norm
from fourfold.parallel.shares import Shares
from fourfold.parallel.stages import StageCut, cut_stages, note_tied
from fourfold.parallel.step import Staged, StagedModel, nothing, whole
from fourfold.parallel.tensor import share_tensors
from fourfold.parallel.vocabulary import VocabularyShare
from fourfold.planning.stages import min_microbatches, rank_of_stage

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Parallelized:
    """A model split over a mesh.

    Attributes:
        runner: what is called for a forward pass: the model itself, or its wrapper.
        sync: steers the exchange of gradients.
        reducer: adds up losses and counts over ranks.
        autocast: the context of a forward pass, where the split casts by itself; None leaves it to the caller.
        shares: which parameters are parts of larger ones.
        localize: a micro-batch on the host -> the part of it that this rank computes.
        finish: completes the gradients after the last backward pass of a step.
        gradient_norm: measures the gradients of the given parameters, over all ranks.
        load: counts how evenly experts are used; None for a model that is not watched.
        vocabulary: the head's tokens on this rank, where ranks share the vocabulary.
        router_copies: how many ranks compute the same router loss, whose gradients are then added up.
        multiple: the positions of a micro-batch's rows must be a multiple of this.
        context: the ranks that share each row's positions, None where one has them all.
        pipeline: runs the stages of this rank; None for a model in one piece.
        min_batches: micro-batches that a step should be cut into at least.
    """

    runner: nn.Module
    sync: GradientSync = field(default_factory=NoSync)
    reducer: Reducer = field(default_factory=Reducer)
    autocast: Callable[[], AbstractContextManager[object]] | None = None
    shares: Shares = field(default_factory=Shares)
    localize: Callable[[Batch], Batch] = whole
    finish: Callable[[], None] = nothing
    gradient_norm: GradientNorm = gradient_norm
    load: ExpertLoad | None = None
    vocabulary: VocabularyShare | None = None
    router_copies: int = 1
    multiple: int = 1
    context: ContextParallel | None = None
    pipeline: Pipeline | None = None
    min_batches: int = 1

    def staged(self, model: StagedModel) -> Staged | None:
        """How a step runs a model through the pipeline; None without one."""
        return None if self.pipeline is None else Staged(self.pipeline, model)


def no_weights(shares: Shares) -> None:
    """The weights are there already."""


def parallelize(
    root: PreTrainedModel,
    blocks: Sequence[nn.Module],
    mesh: Mesh,
    *,
    compute: torch.dtype | None,
    fill: Callable[[Shares], None] = no_weights,
    vocabulary: int | None = None,
) -> Parallelized:
    """Split a model, in place: pipeline stages, experts, matrices, then data parallelism around what is left.

    A model of which nothing is trained has no gradients to exchange, and is never run backwards.

    Args:
        root: the module whose forward pass is called.
        blocks: its decoder layers.
        compute: dtype of the computation where it differs from that of the parameters (mixed precision by FSDP).
        fill: reads the weights of a model that has none yet, once this rank's parts of them are cut out.
        vocabulary: cut a shared vocabulary as if it had so many tokens; see `share_tensors`.
    """
    layout = mesh.layout
    is_frozen = not any(parameter.requires_grad for parameter in root.parameters())
    if layout.ep > 1:
        check_experts(root, layout.ep)
    load = ExpertLoad(root, is_shared=mesh.device_mesh is not None)
    if mesh.device_mesh is None:
        return Parallelized(root, load=load)
    shares = Shares()
    split = Parallelized(root, shares=shares, reducer=_reducer(mesh), load=load)
    if layout.cp > 1:
        context = share_positions(mesh)
        split = replace(split, context=context, localize=context.localize, multiple=split.multiple * context.num_chunks)
        log.info("Positions shared by %d ranks (%s)", layout.cp, layout.cp_method)
    cut = None
    if layout.pp > 1:
        cut = cut_stages(root, mesh, compute)
        owned = {id(module) for module in root.modules()}
        blocks = [block for block in blocks if id(block) in owned]
        log.info("Cut into %d stages of a pipeline, %s layers here", cut.num_stages, len(blocks))
    if layout.tp * layout.pp * layout.ep > 1:
        norm = partial(_gradient_norm, root, shares, mesh)
        split = replace(split, finish=partial(shares.add_up_gradients, root), gradient_norm=norm)
    experts: list[nn.Module] = []
    if layout.ep > 1:
        experts = split_experts(root, mesh, shares)
        log.info("Cut the experts of %d layers over %d ranks", len(experts), layout.ep)
    if layout.tp > 1:
        runs = [blocks] if cut is None else [part.blocks() for part in cut.parts]
        split = _share_tensors(split, runs, mesh, vocabulary)
    if is_frozen and layout.shards > 1:
        blocks = [*_embedding_alone(root), *blocks]
    if cut is not None:
        shard_stages = partial(_shard, root, blocks, mesh, 1, compute, experts)
        return _with_pipeline(split, root, mesh, cut, shard_stages, partial(fill, shares), is_frozen=is_frozen)
    if layout.shards > 1:
        sharded = _shard(root, blocks, mesh, layout.zero, compute, experts)
        fill(shares)
        return replace(split, sync=FsdpSync(sharded, layout.zero), autocast=nullcontext)
    fill(shares)
    if layout.dp_replicate * layout.cp > 1 and not is_frozen:
        wrapped = replicate(root, mesh.group(("dp_replicate", "cp")))
        log.info("Replicated by DDP over %d ranks", layout.dp_replicate * layout.cp)
        return replace(split, runner=wrapped, sync=DdpSync(wrapped))
    return split


def _embedding_alone(root: PreTrainedModel) -> list[nn.Module]:
    """The embedding, where it can be a unit of its own: a loss needs the head for long after the forward pass."""
    embedding, head = root.get_input_embeddings(), root.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or getattr(head, "weight", None) is embedding.weight:
        return []
    return [embedding]


def _share_tensors(
    split: Parallelized, runs: Sequence[Sequence[nn.Module]], mesh: Mesh, vocabulary: int | None
) -> Parallelized:
    layout, root = mesh.layout, split.runner
    assert isinstance(root, PreTrainedModel)
    sequence = layout.sequence_parallel
    tensors = share_tensors(
        root,
        runs,
        mesh.view(("tp",)),
        split.shares,
        sequence=sequence,
        loss=layout.loss_parallel,
        vocabulary=vocabulary,
    )
    log.info("Matrices shared by %d ranks%s", layout.tp, ", positions between them, too" if sequence else "")
    return replace(
        split,
        vocabulary=tensors.vocabulary,
        router_copies=tensors.router_copies,
        multiple=split.multiple * (layout.tp if sequence else 1),
    )


def _reducer(mesh: Mesh) -> Reducer:
    reducer = Reducer(
        group=mesh.group(("dp_replicate", "dp_shard", "cp")),
        data=mesh.group(("dp_replicate", "dp_shard")),
        world=torch.distributed.group.WORLD,
    )
    pipeline = mesh.group(("pp",))
    if pipeline is None:
        return reducer
    last = torch.distributed.get_global_rank(pipeline, rank_of_stage(mesh.layout, -1))
    return replace(reducer, pipeline=pipeline, loss_rank=last)


def _shard(
    root: nn.Module,
    blocks: Sequence[nn.Module],
    mesh: Mesh,
    zero: int,
    compute: torch.dtype | None,
    experts: Sequence[nn.Module],
) -> FSDPModule:
    axes = ("dp_replicate", "dp_shard") if mesh.layout.dp_replicate > 1 else ("dp_shard",)
    log.info("Sharded by FSDP over %s, ZeRO stage %d", " x ".join(axes), zero)
    expert_mesh = None if mesh.expert_mesh is None else mesh.expert_mesh[axes]
    return shard(
        root,
        blocks,
        mesh.sharding(axes),
        reshard=mesh.layout.reshards if mesh.layout.pp == 1 else False,
        compute=compute,
        on_host=mesh.layout.offload == "params",
        apart=experts,
        apart_mesh=expert_mesh,
    )


def _with_pipeline(
    split: Parallelized,
    root: PreTrainedModel,
    mesh: Mesh,
    cut: StageCut,
    shard_stages: Callable[[], FSDPModule],
    fill: Callable[[], None],
    *,
    is_frozen: bool,
) -> Parallelized:
    """Data parallelism around the stages of a pipeline: gradients travel once a step, whatever the ZeRO stage."""
    layout = mesh.layout
    if not is_frozen and not any(parameter.requires_grad for parameter in root.parameters()):
        layers = ", ".join(f"{part.layers.start} to {part.layers.stop - 1}" for part in cut.parts)
        raise PlanError(
            f"parallel.pp: nothing is trained in layers {layers}, and a stage of its own would only pass gradients on. "
            "Train something in every stage, or use dp_shard."
        )
    note_tied(split.shares, root, cut)  # on top of what matrices were cut into
    sync: StepSync = NoStepSync()
    if layout.shards > 1:
        pipeline = mesh.group(("pp",))
        assert pipeline is not None
        sync = FsdpOnceAStep(shard_stages(), mesh.device, pipeline)
        split = replace(split, autocast=nullcontext)
    elif layout.dp_replicate * layout.cp > 1:
        sync = SumOverReplicas(root, mesh.group(("dp_replicate", "cp")))
        log.info("Replicated over %d pipelines", layout.dp_replicate * layout.cp)
    fill()
    return replace(split, pipeline=Pipeline(cut, mesh, sync), min_batches=min_microbatches(layout))


def _gradient_norm(root: nn.Module, shares: Shares, mesh: Mesh, parameters: Sequence[nn.Parameter]) -> Tensor:
    """The norm over all ranks, though each holds another part of the model."""
    spread = Spread(shares.by_parameter(root), mesh.layout.world_size // mesh.layout.pp, mesh.device)
    return gradient_norm(parameters, spread=spread)
