"""Answers by the model that is being trained, in place: its weights, adapters and layout as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from fourfold.base.errors import ConfigError, ModelError
from fourfold.families.shared_positions import CHANGING_ROTATION, position_obstacles
from fourfold.generate.interface import Sampling
from fourfold.generate.rollout.cache import attention_for_rollouts, can_roll_out
from fourfold.generate.rollout.loop import Answer, Loop, Request
from fourfold.generate.rollout.passes import Passes
from fourfold.generate.rollout.sampler import state_of
from fourfold.models.forward import StepModel
from fourfold.models.unwrap import base_model
from fourfold.parallel.apply import Parallelized
from fourfold.parallel.mesh import Mesh
from fourfold.parallel.stacked_experts import has_experts


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer to one prompt.

    Attributes:
        tokens: with the stop token, if it came to one.
        finished: whether it came to a stop token; else it was cut at its longest.
        logprobs: of each token under the full softmax of the model's own logits at temperature 1, whatever the
            sampling; empty unless asked for.
    """

    tokens: list[int]
    finished: bool
    logprobs: list[float]


class RolloutEngine:
    """Generates with a model that is split over a mesh, without leaving a trace in it.

    Every rank of the job makes one and calls `generate` as often as the others. Data-parallel ranks have prompts of
    their own, also none; ranks that share a model (tp, pp, cp) give the same prompts and get the same answers.

    Args:
        model, mesh, split: as they are trained (training/build.py).
        autocast: the context of a forward pass, a fresh one for each call.
        stop_token_ids: each of them ends an answer.
        pad_token_id: fills rows up; nothing looks at it.
        batch_tokens: positions, of prompts and answers, that the cache of a rank has room for; a single prompt may need
            more.
        keep_gathered: under FSDP, gather the weights once a call and keep them until its end: the memory of a whole
            model on each rank, and no waiting for weights at each token. Not with weights that are kept on the host.
        graphs: replay steps as CUDA graphs where the model is one process's.
    Raises:
        ModelError: a model whose layers do more than attend by Transformers' interface.
    """

    def __init__(
        self,
        model: StepModel,
        mesh: Mesh,
        split: Parallelized,
        *,
        autocast: Callable[[], AbstractContextManager[object]],
        stop_token_ids: Sequence[int],
        pad_token_id: int,
        batch_tokens: int,
        keep_gathered: bool = False,
        graphs: bool = True,
    ) -> None:
        self._model, self._mesh, self._autocast = model, mesh, autocast
        self._inner = base_model(model.module)
        if not can_roll_out(self._inner.config, type(self._inner)):
            raise ModelError(
                f"{self._inner.config.model_type}: answers cannot be generated while training, since its layers carry "
                "more than keys and values from token to token, or mask them in a way of their own."
            )
        self._stop_token_ids, self._pad_token_id = tuple(stop_token_ids), pad_token_id
        self._batch_tokens = batch_tokens
        self._passes = Passes(model, split)
        layout = mesh.layout
        self._keep_gathered = keep_gathered and layout.shards > 1 and layout.offload != "params"
        self._reshards = layout.reshards and layout.pp == 1
        # experts are shared by ranks of the same group
        self._bound = mesh.group(("dp_shard", "cp")) if layout.shards > 1 else None
        self._context = mesh.group(("cp",))
        self._graphs = graphs and mesh.device.type == "cuda" and self._can_record()
        self._longest: int | None = self._inner.config.get_text_config().to_dict().get("max_position_embeddings")

    def _can_record(self) -> bool:
        """Whether a step waits neither for another rank nor for the host."""
        layout = self._mesh.layout
        rotates = CHANGING_ROTATION in position_obstacles(self._inner.config.get_text_config(), type(self._inner))
        return layout.tp * layout.pp * layout.shards == 1 and not rotates and not has_experts(self._inner)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        keys: Sequence[int] | None = None,
        logprobs: bool = False,
    ) -> list[Completion]:
        """Answer prompts, in their order.

        The same prompt with the same key and `sampling.seed` (None counts as 0) gets the same answer, whatever it is
        answered with and under whatever layout, as far as rounding allows.

        Args:
            prompts: token ids, at least one each.
            keys: of each prompt's randomness; default: its place in the list.
            logprobs: also return the tokens' log-probabilities.
        Raises:
            ConfigError: beams are asked for.
            ModelError: a prompt leaves no room for an answer in the model's context.
        """
        if sampling.num_beams > 1:
            raise ConfigError(
                f"num_beams: {sampling.num_beams} cannot be used while training, since answers are sampled token by "
                "token. Use num_beams: 1."
            )
        numbers = range(len(prompts)) if keys is None else keys
        requests = [
            Request(prompt, self._room(sampling, len(prompt)), state_of(sampling.seed or 0, key))
            for prompt, key in zip(prompts, numbers, strict=True)
        ]
        own = requests[self._mesh.index("cp") :: self._mesh.layout.cp]
        with torch.no_grad(), self._prepared():
            loop = Loop(
                self._passes,
                own,
                sampling,
                self._mesh.device,
                stop_token_ids=self._stop_token_ids,
                pad_token_id=self._pad_token_id,
                batch_tokens=self._batch_tokens,
                logprobs=logprobs,
                agree=None if self._bound is None else self._agree,
                graphs=self._graphs,
            )
            answers = loop.run()
        return [self._completion(answer) for answer in self._of_all(answers, len(requests))]

    def _completion(self, answer: Answer) -> Completion:
        return Completion(answer.tokens, answer.tokens[-1] in self._stop_token_ids, answer.logprobs)

    def _room(self, sampling: Sampling, prompt_length: int) -> int:
        """How many tokens an answer may have: as many as asked for, at most to the end of the model's context.

        Raises:
            ModelError: none.
        """
        longest = self._longest
        if sampling.max_length is not None:
            longest = sampling.max_length if longest is None else min(longest, sampling.max_length)
        if not prompt_length or (longest is not None and prompt_length >= longest):
            raise ModelError(
                f"A prompt has {prompt_length} tokens, but it must have some, and prompt and answer together may have "
                f"{longest}. Leave it out, or cut it."
            )
        if longest is None:
            return sampling.max_new_tokens
        left = longest - prompt_length
        return left if sampling.max_length is not None else min(sampling.max_new_tokens, left)

    def _agree(self, num_groups: int, num_steps: int) -> tuple[int, int]:
        wanted = torch.tensor([num_groups, num_steps])  # on the host, so that no device is waited for
        dist.all_reduce(wanted, op=dist.ReduceOp.MAX, group=self._bound)
        most = wanted.tolist()
        return most[0], most[1]

    def _of_all(self, own: list[Answer], count: int) -> list[Answer]:
        """The answers of ranks that share their prompts, in the prompts' order."""
        if self._context is None:
            return own
        found: list[list[Answer] | None] = [None] * self._context.size()
        dist.all_gather_object(found, own, self._context)
        by_rank = [iter(answers or []) for answers in found]
        return [next(by_rank[number % len(by_rank)]) for number in range(count)]

    @contextmanager
    def _prepared(self) -> Iterator[None]:
        """The model in evaluation mode, with this attention; afterwards as it was, and its weights sharded."""
        with ExitStack() as stack:
            stack.enter_context(_evaluating(self._model.module))
            stack.enter_context(attention_for_rollouts(self._inner))
            if self._mesh.layout.shards > 1:
                stack.enter_context(_sharded_after(self._inner, self._reshards, self._keep_gathered))
            stack.enter_context(self._autocast())
            yield


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards each part is in the mode that it was in."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


@contextmanager
def _sharded_after(root: nn.Module, reshards: bool, keep: bool) -> Iterator[None]:
    """Free FSDP's gathered weights at the end, and not before it if they are to be kept."""
    assert isinstance(root, FSDPModule)
    units = [module for module in root.modules() if isinstance(module, FSDPModule)]
    if keep:
        root.set_reshard_after_forward(False)
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            if keep:
                unit.set_reshard_after_forward(reshards and unit is not root, recurse=False)
