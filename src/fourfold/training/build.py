"""The model as a rank trains it: noise, precision and layout around loaded or made-up weights."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from fourfold.base.errors import PlanError
from fourfold.base.log import get_logger
from fourfold.base.units import format_bytes
from fourfold.config.schema import Run
from fourfold.dataset.batch import Batch
from fourfold.generate.rollout import RolloutEngine
from fourfold.models import document_attention, equal_documents
from fourfold.models.adapters import without_adapters
from fourfold.models.attention import knows_caps
from fourfold.models.compiled import compile_layers, join_small_kernels, recompute_compiled
from fourfold.models.document_rows import find_mixers, read_besides
from fourfold.models.equal_documents import EqualDocuments
from fourfold.models.float8 import MULTIPLE, use_float8
from fourfold.models.forward import StepModel, supports_packing
from fourfold.models.lora import join_siblings, make_room, use_short_forward
from fourfold.models.masters import add_within_products, keep_copies, use_wide_products
from fourfold.models.noise import NoiseKeys, add_neftune, key_dropout
from fourfold.models.router import find_routers
from fourfold.models.targets import decoder_blocks, final_norms
from fourfold.models.trained_linear import join_trained_siblings
from fourfold.models.unpacked import keep_unpacked
from fourfold.models.unwrap import TunedModel, base_model
from fourfold.parallel.apply import Parallelized, no_weights, parallelize
from fourfold.parallel.expert_adapters import use_row_adapters
from fourfold.parallel.fsdp import join_gradients
from fourfold.parallel.graphs import Graphs
from fourfold.parallel.host_embedding import keep_on_host
from fourfold.parallel.local_experts import use_local_experts
from fourfold.parallel.mesh import Mesh
from fourfold.parallel.offload import offload_activations
from fourfold.parallel.recompute import Recompute
from fourfold.parallel.shares import Shares
from fourfold.parallel.stacked_experts import experts_and_adapters
from fourfold.parallel.stages import Skip
from fourfold.parallel.step import LossFunction, Step, no_figures
from fourfold.planning.job import LOW_MEMORY_CHUNK
from fourfold.training.fast import NOTHING_FAST, Fast, what_goes
from fourfold.training.memory import SWITCH, enable_recompute
from fourfold.training.precision import Precision, cast_experts, narrow_outputs

log = get_logger(__name__)

_FIRST_WITH_FLOAT8 = (8, 9)
"""Compute capability."""


@dataclass(frozen=True, slots=True)
class Built:
    """A model on its rank.

    Attributes:
        module: the model as it is trained and saved, possibly wrapped by PEFT.
        model: the same as the step runs it.
        mesh: this rank's place in the job.
        split: how the model is spread over the mesh.
        num_parameters: of the whole model without its embeddings.
        fast: what its step may do beyond running layer after layer.
        float8: trained matrices are multiplied in float8.
    """

    module: TunedModel
    model: StepModel
    mesh: Mesh
    split: Parallelized
    noise: NoiseKeys
    precision: Precision
    num_parameters: int
    fast: Fast = field(default_factory=Fast)
    float8: bool = False

    @property
    def autocast(self) -> Callable[[], AbstractContextManager[object]]:
        """The context of a forward pass."""
        return self.split.autocast or self.precision.autocast(self.mesh.device)

    @property
    def multiple(self) -> int:
        """What the positions of a micro-batch's rows must be a multiple of."""
        return self.split.multiple * (MULTIPLE if self.float8 else 1)

    def step(
        self, objective: LossFunction, filler: Callable[[], Batch], scaler: torch.amp.GradScaler | None = None
    ) -> Step:
        """The engine that runs forward and backward."""
        step = Step(
            model=self.model,
            objective=objective,
            device=self.mesh.device,
            autocast=self.autocast,
            filler=filler,
            scale=None if scaler is None else scaler.scale,
            sync=self.split.sync,
            reducer=self.split.reducer,
            localize=self.split.localize,
            finish=self.split.finish,
            observe=no_figures if self.split.load is None else self.split.load.figures,
            staged=self.split.staged(self.model),
            module=self.module,
            reference=partial(without_adapters, self.module),
            asked=self.model.asked,
        )
        if not (self.fast.graphs and getattr(objective, "is_fixed", False)):
            return step
        trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        work = partial(step.work, parameters=trained)
        prepare = self.model.with_noise
        graphs = Graphs(self.mesh.device, trained, work, compiled=self.fast.compiled, prepare=prepare)
        return replace(step, graphs=graphs)

    def keep_unpacked(self, run: Run) -> int:
        """Unpack the model's 4-bit weights for good; returns how many were packed."""
        count = keep_unpacked(self.module)
        _join_layers(run, self.mesh, self.module)
        if self.fast.compiled:
            _make_room(self.mesh, self.module)
        return count

    def keep_copies(self) -> int:
        """Keep copies of masters in the compute dtype; returns their bytes."""
        assert self.precision.narrow is not None and not self.fast.graphs, "a recording would go on with what it saw"
        return keep_copies(self._layers(), self.precision.narrow)

    def rollouts(self, *, stop_token_ids: Sequence[int], pad_token_id: int, batch_tokens: int) -> RolloutEngine:
        """The engine that answers prompts with the model as it is; every rank of the job must call.

        Args:
            batch_tokens: positions, of prompts and answers, that the cache of a rank has room for.
        Raises:
            ModelError: the engine does not know how to run such a model.
        """
        return RolloutEngine(
            self.model,
            self.mesh,
            self.split,
            autocast=self.autocast,
            stop_token_ids=stop_token_ids,
            pad_token_id=pad_token_id,
            batch_tokens=batch_tokens,
            keep_gathered=self._has_room_for_all(),
        )

    def _has_room_for_all(self) -> bool:
        """Whether the weights that ranks shard would fit, gathered, into half of what is free on each of them."""
        device = self.mesh.device
        if self.mesh.layout.shards == 1 or device.type != "cuda":
            return False
        size = sum(parameter.numel() for parameter in self.module.parameters()) * self.precision.compute.itemsize
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        lacks = 2 * size > free - torch.cuda.memory_allocated(device)
        return self.split.reducer.largest(int(lacks)) == 0

    @property
    def spares_layers(self) -> bool:
        """Whether some layers may be computed again, and others not."""
        return self.fast.compiled or all(hasattr(layer, SWITCH) for layer in self._layers())

    def recompute(self, kind: Recompute, spared: int = 0) -> Recompute:
        """Have the backward pass compute decoder layers again; returns what it will do.

        Args:
            spared: layers of which nothing is computed again: the last ones, whose activations are needed first.
        """
        layout = self.mesh.layout
        if kind == "selective" and layout.pp > 1 and layout.pp_schedule == "zbv":
            kind = "full"  # zbv computes a layer again twice, and selective hands out what it kept once
        if self.fast.compiled:
            if kind == "full":
                layers = self._layers()
                remember = read_besides(base_model(self.module), self.noise)
                recompute_compiled(layers[: len(layers) - spared], remember)
            return "full" if kind == "full" else "none"
        if kind != "none":
            enable_recompute(self.module, kind, self.noise, spared)
        return kind

    def join_gradients(self) -> None:
        """Have FSDP's shards of gradients lie in memory that activations can use before they come."""
        if self.mesh.device.type == "cuda":
            join_gradients(self.module)

    def _layers(self) -> list[nn.Module]:
        """The decoder layers of this rank."""
        return [layer for layer in decoder_blocks(base_model(self.module))[1] if not isinstance(layer, Skip)]


def build(
    run: Run,
    precision: Precision,
    mesh: Mesh,
    module: TunedModel,
    fill: Callable[[Shares], None] = no_weights,
    *,
    packs: bool = True,
    vocabulary: int | None = None,
    wishes: Fast = NOTHING_FAST,
) -> Built:
    """Prepare a model for training and split it over a mesh, in place.

    Args:
        module: with its adapters, on the device of the mesh; or without weights, and `fill` reads them.
        packs: whether rows may be packed, for all that the model itself knows.
        vocabulary: see `parallelize`.
        wishes: what the step is to do beyond running layer after layer, where it can.
    """
    noise = _prepare_layers(run, precision, mesh, module)
    with precision.autocast(mesh.device)():  # the model is tried out here, and its masters may be wider than the rest
        model = StepModel(
            module,
            packed=packs
            and run.model.flash_attn in ("auto", "fa2", "fa3")
            and supports_packing(module, run.data.cutoff_len),
            noise=noise,
            balance_experts=bool(run.model.moe_aux_loss_coef),
        )
    inner = base_model(module)
    fast = what_goes(wishes, model, mesh, precision, run)
    num_parameters = inner.num_parameters(exclude_embeddings=True)  # before this rank is left with its part
    _make_fast(run, mesh, model, fast, precision)
    # no name is given to the list of layers, which would hold those that this rank is not left with
    split = parallelize(
        inner, list(decoder_blocks(inner)[1]), mesh, compute=precision.narrow, fill=fill, vocabulary=vocabulary
    )
    model.take(split)
    if fast.compiled and mesh.layout.splits_model and mesh.layout.shards == 1:
        _join_layers(run, mesh, module)  # now that this rank has its parts of their weights
        _make_room(mesh, module)
    if mesh.layout.world_size == 1 and not fast.graphs:
        add_within_products(decoder_blocks(inner)[1])
    if mesh.layout.splits_model or mesh.layout.shards > 1:
        _free_what_was_cut_away(mesh.device)
    if run.parallel.offload_activations:
        _offload_activations(inner, mesh.device)
    return Built(module, model, mesh, split, noise, precision, num_parameters, fast, run.training.fp8)


def _prepare_layers(run: Run, precision: Precision, mesh: Mesh, module: TunedModel) -> NoiseKeys:
    """Give layers the forward passes, the noise and the dtypes that they train with; returns the keys of the noise."""
    training = run.training
    if not mesh.layout.splits_backward:  # one function cannot make its gradients in two parts
        use_short_forward(module)
    if not mesh.layout.splits_model:
        _join_layers(run, mesh, module)
    if run.parallel.memory == "low" and mesh.device.type == "cuda" and not mesh.layout.splits_model:
        _keep_embedding_on_host(base_model(module))
    noise = NoiseKeys(training.seed, device=mesh.device)
    key_dropout(module, noise)
    if training.neftune_noise_alpha:
        add_neftune(module, noise, training.neftune_noise_alpha)
    if precision.narrow == torch.bfloat16:  # fp16 would overflow between layers
        narrow_outputs(module, torch.bfloat16)
    use_local_experts(module)
    use_row_adapters(module)
    if precision.narrow is not None:
        cast_experts(module, precision.narrow)
    return noise


def _make_fast(run: Run, mesh: Mesh, model: StepModel, fast: Fast, precision: Precision) -> None:
    """Have layers run as was chosen: in float8, compiled, on batches of fixed form, in little memory."""
    blocks = list(decoder_blocks(base_model(model.module))[1])
    if run.training.fp8:
        _use_float8(blocks, mesh)
    if fast.compiled:
        if precision.narrow is not None and mesh.layout.shards == 1:  # FSDP gathers in the compute dtype
            use_wide_products(blocks, precision.narrow)
        join_trained_siblings(model.module, apart=_apart(run, model.module))
        if not mesh.layout.splits_model:
            _make_room(mesh, model.module)
        join_small_kernels(joins=mesh.layout.tp == 1)
        around = experts_and_adapters(base_model(model.module)) if fast.around_experts else []
        around += find_mixers(base_model(model.module))
        if model.balance_experts:
            around += find_routers(base_model(model.module))
        model.compiled = compile_layers(blocks, around=around, in_context=mesh.layout.cp > 1)
        compile_layers(final_norms(base_model(model.module)))  # by themselves: a failure is no other layer's
        model.equal = EqualDocuments(run.data.cutoff_len) if equal_documents.has_kernel(mesh.device) else None
    model.fixed = fast.compiled or fast.graphs
    text = base_model(model.module).config.get_text_config()
    finds_reach = model.fixed or (model.packed and model.caps_scores and knows_caps(text, mesh.device))
    model.reaches = finds_reach and document_attention.has_kernel(mesh.device)
    if run.parallel.memory == "low":
        model.chunk_tokens = LOW_MEMORY_CHUNK


def _has_weights(mesh: Mesh) -> bool:
    """Whether this rank is a GPU that has all that it needs of the layers' weights, for good."""
    return mesh.device.type == "cuda" and mesh.layout.shards == 1 and mesh.layout.offload == "none"


def _make_room(mesh: Mesh, module: nn.Module) -> None:
    """Make room for low-rank terms beside the weights of layers that run compiled."""
    if _has_weights(mesh):
        make_room(module)


def _join_layers(run: Run, mesh: Mesh, module: nn.Module) -> None:
    """Let layers of one input be one product."""
    if _has_weights(mesh):
        # on a CPU it is no faster, and takes memory (docs/lab-notes.md)
        join_siblings(module, apart=_apart(run, module))


def _apart(run: Run, module: nn.Module) -> frozenset[str]:
    """Layers that stay by themselves though they are given their neighbours' input, and their neighbours with them."""
    found: set[str] = set()
    if run.model.enable_liger_kernel:
        found.add("gate_proj")  # its kernel copies what is part of a tensor
    if getattr(base_model(module).config.get_text_config(), "clip_qkv", None) is not None:
        found.add("q_proj")  # olmo clips each in place, which no part of a result may be
    return frozenset(found)


def _use_float8(blocks: Sequence[nn.Module], mesh: Mesh) -> None:
    """Multiply in float8 wherever a layer's sizes allow it.

    Raises:
        PlanError: the GPU has no float8.
    """
    device = mesh.device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _FIRST_WITH_FLOAT8:
        name = torch.cuda.get_device_name(device)
        raise PlanError(f"fp8: true needs a GPU that multiplies in float8, and {name} does not. Remove fp8.")
    count = use_float8(blocks, parts=mesh.layout.tp)
    if any(parameter.requires_grad for block in blocks for parameter in block.parameters()):  # a teacher's are not
        log.info("%d matrices are multiplied in float8", count)


def _keep_embedding_on_host(inner: PreTrainedModel) -> None:
    embedding, head = inner.get_input_embeddings(), inner.get_output_embeddings()
    if head is None or head.weight is not embedding.weight:  # a tied one is an operand of a product
        spared = keep_on_host(embedding)
        log.info("memory: low keeps %s of the embedding in host memory", format_bytes(spared))


def _free_what_was_cut_away(device: torch.device) -> None:
    """Return what other ranks hold now to the device: modules are cycles, which Python frees late."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _offload_activations(inner: PreTrainedModel, device: torch.device) -> None:
    if device.type == "cpu":
        log.info("offload_activations: on a CPU activations are in host memory already.")
        return
    offload_activations(inner, list(decoder_blocks(inner)[1]))
