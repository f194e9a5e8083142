"""The model as the step sees it: a micro-batch in, hidden states and the head out."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, MoeModelOutputWithPast
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from fourfold.base.errors import ModelError
from fourfold.base.log import get_logger
from fourfold.dataset.batch import Batch
from fourfold.families.decoder import chunk_of, decoder_of
from fourfold.families.experts import experts_per_token
from fourfold.families.recurrent import carries_state
from fourfold.families.shared_positions import caps_scores, is_exchangeable
from fourfold.models import attention, document_attention
from fourfold.models.compiled import Compiled
from fourfold.models.document_rows import has_mixers, keep_documents_apart, told_of
from fourfold.models.equal_documents import EqualDocuments
from fourfold.models.noise import NoiseKeys
from fourfold.models.parameters import is_empty
from fourfold.models.router import balance, balance_sums
from fourfold.models.token_nll import token_nll
from fourfold.models.unwrap import base_model
from fourfold.parallel.apply import Parallelized
from fourfold.parallel.context import ContextParallel, ContextRows
from fourfold.parallel.exchange import scale_gradient
from fourfold.parallel.expert_load import ExpertLoad
from fourfold.parallel.loss import Outputs
from fourfold.parallel.pipeline import Wire
from fourfold.parallel.stages import Part, value_head_of
from fourfold.parallel.vocabulary import VocabularyShare

log = get_logger(__name__)

_CHECK_TOKENS = 8
_ROUNDING = {2: 2e-2}
_ROUNDING_OF_WIDE = 1e-4
"""By bytes of a number, and of others, of the largest hidden state: documents that see each other differ by more."""


def supports_packing(model: nn.Module, longest: int = 0) -> bool:
    """Whether every layer keeps packed documents apart: it takes its attention from Transformers' interface, and
    those that carry a state across positions are known (`document_rows`).

    Args:
        longest: positions of a document; chunks within which a layer attends are not cut in packed rows.
    """
    inner = base_model(model)
    chunk = chunk_of(inner.config.get_text_config())
    if chunk is not None and longest > chunk:
        return False
    return is_exchangeable(inner.config, type(inner)) or has_mixers(inner)


def make_head(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """Hidden states to logits, with the scaling or soft-capping that the config names.

    Source: the `forward` of Transformers' `...ForCausalLM` classes (granite divides by `logits_scaling`, cohere
    multiplies by `logit_scale`, gemma caps by `final_logit_softcapping`).
    """
    assert model.get_output_embeddings() is not None, "a causal language model has a head"
    config = model.config
    divide: float | None = getattr(config, "logits_scaling", None)
    multiply: float | None = getattr(config, "logit_scale", None)
    cap: float | None = getattr(config, "final_logit_softcapping", None)

    def head(hidden: Tensor) -> Tensor:
        lm_head = model.get_output_embeddings()  # looked up late: a pipeline drops it on other ranks
        assert lm_head is not None
        logits = lm_head(hidden)
        if divide is not None:
            logits = logits / divide
        if multiply is not None:
            logits = logits * multiply
        return logits if cap is None else cap * torch.tanh(logits / cap)

    return head


def accept_hidden_only(model: PreTrainedModel) -> None:
    """Let `model(..., hidden_only=True)` end after the decoder, so that no logits are made.

    It must be the model itself that is called, not its decoder: what shards or wraps a model for several ranks hooks
    into the call of its root.
    """
    whole, decoder = model.forward, decoder_of(model)

    @functools.wraps(whole)
    def forward(*args: Any, hidden_only: bool = False, **kwargs: Any) -> Any:
        return (decoder if hidden_only else whole)(*args, **kwargs)

    model.forward = forward


class _MadeUp(MoeModelOutputWithPast):
    """A decoder's outputs of which the hidden states are known, and all that a family adds is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def _no_logits(hidden: Tensor) -> Tensor:
    raise ModelError(
        "model_name_or_path: the head of this model family is more than a matrix, so there are no logits beside the "
        "values of a value head. Use another model."
    )


@dataclass
class StepModel:
    """Runs a model on micro-batches.

    Attributes:
        module: the model, possibly wrapped by PEFT; what is trained and saved.
        packed: whether it is fed packed rows.
        balance_experts: also compute the experts' load-balancing loss.
        noise: keys of dropout and input noise, told of every micro-batch; None where there is neither.
        vocabulary: the head's tokens on this rank, where ranks share the vocabulary.
        router_copies: how many ranks compute the same router loss, whose gradients are then added up.
        runner: what is called for a forward pass; the Transformers model, or what wraps it for several ranks.
        context: the ranks that share each row, None where one has it all.
        load: counts how evenly experts are used.
        fixed: give attention the documents' offsets alone, and no numbers that differ from batch to batch: what is
            compiled or recorded would be made anew for each.
        compiled: what compiled layers share, the loss being compiled as well; None where they run as they are.
        caps_scores: scores of its attention are soft-capped.
        reaches: attention has kernels that are told who sees what.
        equal: finds rows of equally long documents, where attention has a faster kernel for them.
        chunk_tokens: positions whose logits exist at one time; None for the device's own number.
        keep_logits: keep them for the backward pass where layers are compiled.
        keeps_rows_apart: whether several documents may lie in one row.
    """

    module: nn.Module
    packed: bool
    noise: NoiseKeys | None = None
    balance_experts: bool = False
    vocabulary: VocabularyShare | None = None
    router_copies: int = 1
    runner: nn.Module = field(init=False)
    context: ContextParallel | None = field(init=False, default=None)
    load: ExpertLoad | None = field(init=False, default=None)
    fixed: bool = field(init=False, default=False)
    compiled: Compiled | None = field(init=False, default=None)
    caps_scores: bool = field(init=False)
    reaches: bool = field(init=False, default=False)
    equal: EqualDocuments | None = field(init=False, default=None)
    chunk_tokens: int | None = field(init=False, default=None)
    keep_logits: bool = field(init=False, default=False)
    keeps_rows_apart: bool = field(init=False)

    def __post_init__(self) -> None:
        self.runner = self._inner = base_model(self.module)
        accept_hidden_only(self._inner)
        self.caps_scores = caps_scores(self._inner.config.get_text_config())
        keep_documents_apart(self._inner, self.noise)
        if self.packed:
            self._use_packed_attention()
        elif self.caps_scores:
            self._inner.set_attn_implementation("eager")
        self.keeps_rows_apart = self._keeps_rows_apart()
        self._head: Callable[[Tensor], Tensor] | None = make_head(self._inner)
        if not (self._head_is_right_alone() if is_empty(self._inner) else self._head_is_right()):
            log.info("The head of %s is not a plain one; its full logits are used.", type(self._inner).__name__)
            self._head = None

    @torch.no_grad()
    def _keeps_rows_apart(self) -> bool:
        """Whether documents of one row get what each gets alone: tried on a few tokens, and not where there are no
        weights to try it with, or a state goes from one to the next.

        Of padded rows Transformers makes masks by the positions, but some families do not tell it of them.
        """
        if self.packed or carries_state(self._inner.config, type(self._inner)) or is_empty(self._inner):
            return self.packed
        ids = torch.arange(1, 1 + 2 * _CHECK_TOKENS, device=self._inner.device)[None] % self._inner.config.vocab_size
        places = torch.arange(_CHECK_TOKENS, device=self._inner.device)[None]
        found = self._hidden_of(ids, places.repeat(1, 2))[:, _CHECK_TOKENS:].float()
        alone = self._hidden_of(ids[:, _CHECK_TOKENS:], places)
        limit = _ROUNDING.get(alone.itemsize, _ROUNDING_OF_WIDE) * float(alone.abs().max())
        return float((found - alone.float()).abs().max()) <= limit

    def _hidden_of(self, ids: Tensor, positions: Tensor) -> Tensor:
        """The last hidden states of tokens, as in an evaluation: [B, S] -> [B, S, hidden size]."""
        was_training = self.module.training
        self.module.eval()
        found = self._inner(input_ids=ids, position_ids=positions, use_cache=False, hidden_only=True).last_hidden_state
        self.module.train(was_training)
        return found

    def _use_packed_attention(self) -> None:
        attention.register()
        self._inner.set_attn_implementation(attention.NAME)

    @torch.no_grad()
    def _head_is_right(self) -> bool:
        """Whether decoder and head, called apart, give the model's own logits on a few tokens."""
        assert self._head is not None
        ids = torch.arange(1, 1 + _CHECK_TOKENS, device=self._inner.device)[None] % self._inner.config.vocab_size
        alone = (_CHECK_TOKENS,)
        kwargs: dict[str, object] = {"lengths": alone, **told_of(self._inner, alone)} if self.packed else {}
        was_training = self.module.training
        self.module.eval()
        whole = self._inner(input_ids=ids, use_cache=False, **kwargs).logits
        hidden = self._inner(input_ids=ids, use_cache=False, hidden_only=True, **kwargs).last_hidden_state
        apart = self._head(hidden)
        self.module.train(was_training)
        return torch.allclose(whole, apart, rtol=1e-3, atol=1e-3)

    @torch.no_grad()
    def _head_is_right_alone(self) -> bool:
        """The same of a model without weights: hidden states and a small head are made up."""
        inner, own, decoder = self._inner, self._inner.get_output_embeddings(), decoder_of(self._inner)
        size = inner.config.get_text_config().hidden_size
        generator = torch.Generator().manual_seed(0)
        small = nn.Linear(size, _CHECK_TOKENS, bias=False, device="meta")
        small.weight = nn.Parameter(torch.randn(_CHECK_TOKENS, size, generator=generator) / math.sqrt(size))
        hidden = torch.randn(1, _CHECK_TOKENS, size, generator=generator)
        made_up = _MadeUp(last_hidden_state=hidden)  # type: ignore[arg-type]
        inner.set_output_embeddings(small)
        try:
            with mock.patch.object(decoder, "forward", lambda *_, **__: made_up):
                whole = inner(input_ids=torch.zeros(1, _CHECK_TOKENS, dtype=torch.long), use_cache=False).logits
            return not whole.is_meta and torch.allclose(whole, make_head(inner)(hidden), rtol=1e-3, atol=1e-3)
        finally:
            inner.set_output_embeddings(own)

    @property
    def has_plain_head(self) -> bool:
        """Whether its outputs are hidden states and a head; they are logits otherwise."""
        return self._head is not None

    def _boundaries(self, batch: Batch) -> dict[str, object]:
        """What attention is told of the documents."""
        if self.context is not None:
            assert batch.whole_rows is not None, "Parallelized.localize has cut the batch"
            return {"context_rows": ContextRows(self.context, batch.whole_rows, batch.input_ids.device)}
        if not self.packed:
            return {}
        keys = {} if batch.keys is None else {"keys": batch.keys}
        found = {"cu_seqlens": batch.cu_seqlens, **keys, **told_of(self._inner, batch.lengths)}
        if batch.cu_seqlens is None:
            return {**found, "lengths": batch.lengths}
        if self.reaches:
            found["reach"] = document_attention.reach_of(batch.cu_seqlens, batch.input_ids.shape[1], batch.keys)
        too_long = self.caps_scores and batch.input_ids.shape[1] > document_attention.MOST_POSITIONS
        if not self.fixed or too_long:
            return {**found, "lengths": batch.lengths}
        if self.equal is not None:
            found["documents"] = 0 if keys else self.equal.of(batch.lengths)
        return {**found, "longest": batch.max_seqlen}

    def __call__(self, batch: Batch) -> Outputs:
        """Outputs of one micro-batch; its hidden states are [B, S, hidden size] in the compute dtype."""
        outputs = self._call(batch, input_ids=batch.input_ids, hidden_only=self._wants_hidden)
        return self._outputs(outputs, None if self._head is None else self._router_loss(outputs, batch), batch)

    def stage(self, batch: Batch, part: Part, received: tuple[Tensor, ...]) -> Outputs | tuple[Tensor, ...]:
        """One stage of a pipeline on one micro-batch.

        Args:
            received: what the stage before returned; nothing for the first.
        Returns:
            hidden states [B, S, hidden size] and what the experts' balance is made of so far, if it is wanted; or the
            outputs of the last stage.
        """
        entry = {"input_ids": batch.input_ids} if part.is_first else {"inputs_embeds": received[0]}
        with part.running():
            outputs = self._call(batch, hidden_only=self._wants_hidden or not part.is_last, **entry)
        sums = self._balance_sums(outputs, batch, received[1] if len(received) > 1 else None)
        if part.is_last:
            return self._outputs(outputs, None if sums is None else self._as_copy(balance(sums)), batch)
        hidden = outputs.last_hidden_state.to(part.dtype)
        return (hidden,) if sums is None else (hidden, sums)

    def next_logits(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        wanted: Tensor | None,
        *,
        part: Part | None = None,
        received: Tensor | None = None,
        **attention: object,
    ) -> Tensor:
        """The model on one packed row, for generation: what may follow some of its positions.

        No wrapper of replicas is called, so that each may do so as often as it likes; nothing is counted.

        Args:
            input_ids, position_ids: [1, S] int64.
            wanted: [N] int64, the positions whose logits are made; None for all.
            part: the stage that is run; None for the whole model.
            received: [1, S, hidden size], what the stage before returned; None for the first.
            attention: keyword arguments of the attention that is set.
        Returns:
            logits [N, own tokens]; of a stage that is not the last, hidden states [1, S, hidden size].
        """
        entry = {"input_ids": input_ids} if received is None else {"inputs_embeds": received}
        is_last = part is None or part.is_last
        with nullcontext() if part is None else part.running():
            outputs = self._inner(
                position_ids=position_ids,
                use_cache=False,
                hidden_only=self._head is not None or not is_last,
                **entry,
                **attention,
            )
        if part is not None and not is_last:
            return outputs.last_hidden_state.to(part.dtype)
        found = outputs.logits[0] if self._head is None else outputs.last_hidden_state[0]
        found = found if wanted is None else found.index_select(0, wanted)
        return found if self._head is None else self._head(found)

    def wires(self, batch: Batch, hidden_size: int, dtype: torch.dtype) -> list[Wire]:
        """What goes from stage to stage for such a micro-batch."""
        hidden = ((*batch.input_ids.shape, hidden_size), dtype)
        if not self._balances:
            return [hidden]
        return [hidden, ((2 * self._num_experts + 1,), torch.float32)]

    def _call(self, batch: Batch, **inputs: object) -> Any:
        """The runner's own outputs."""
        kwargs = self._boundaries(batch)
        if (noise := self._noise()) is not None:
            noise.enter(batch)
        if self.balance_experts:
            kwargs["output_router_logits"] = True
        with nullcontext() if self.load is None or not self.load.watches else self.load.watch(batch.real_positions()):
            return self.runner(position_ids=batch.position_ids, use_cache=False, **inputs, **kwargs)

    def _outputs(self, outputs: Any, router_loss: Tensor | None, batch: Batch) -> Outputs:
        positions = None if self.context is None else self.context.group
        if not self._wants_hidden:
            return Outputs(
                outputs.logits,
                lambda logits: logits,
                vocabulary=self.vocabulary,
                positions=positions,
                scored=batch.scored,
            )
        return Outputs(
            outputs.last_hidden_state,
            self._head or _no_logits,
            router_loss,
            head_is_frozen=self._head_is_frozen(),
            vocabulary=self.vocabulary,
            positions=positions,
            value=value_head_of(self._inner),
            scored=batch.scored,
            token_nll=token_nll if self._is_compiled() else None,
            chunk_tokens=self.chunk_tokens,
            keep_logits=self.keep_logits,
        )

    @property
    def _wants_hidden(self) -> bool:
        """Whether the last hidden states are taken out, and not the logits: a head is applied to them afterwards."""
        return self._head is not None or value_head_of(self._inner) is not None

    def take(self, split: Parallelized) -> None:
        """Run the model as it was split over ranks."""
        self.runner = split.runner
        self.vocabulary, self.router_copies = split.vocabulary, split.router_copies
        self.context, self.load = split.context, split.load
        if self.context is not None:
            self._use_packed_attention()

    def with_noise(self, batch: Batch) -> Batch:
        """The same micro-batch, which is on the host, with what noise is keyed by, if there is noise."""
        noise = self._noise()
        return batch if noise is None else replace(batch, noise=noise.of(batch))

    def _noise(self) -> NoiseKeys | None:
        """What is to be told of a micro-batch; None where there is no noise, or none now."""
        return self.noise if self.noise is not None and self.noise.salts and self.module.training else None

    def asked(self) -> AbstractContextManager[None]:
        """Within it the model is asked as part of a step that trains it."""
        return nullcontext() if self.compiled is None else self.compiled.asked()

    def _is_compiled(self) -> bool:
        return self.compiled is not None and (torch.is_grad_enabled() or self.compiled.is_asked)

    def _head_is_frozen(self) -> bool:
        head = self._inner.get_output_embeddings()
        return head is not None and not any(parameter.requires_grad for parameter in head.parameters())

    def _router_loss(self, outputs: BaseModelOutput, batch: Batch) -> Tensor | None:
        """The load-balancing loss of all layers' experts (models/router.py); padding does not count."""
        if not self.balance_experts or not isinstance(outputs, MoeModelOutputWithPast) or not outputs.router_logits:
            return None
        if self.context is not None:
            counted = batch.real_positions().reshape(-1)
            loss = balance(balance_sums(outputs.router_logits, self._choices, counted, self.context.group))
        else:
            mask = batch.real_positions() if 0 < batch.num_tokens < batch.document_ids.numel() else None
            loss = load_balancing_loss_func(outputs.router_logits, self._num_experts, self._choices, mask)
            assert isinstance(loss, Tensor)
        return self._as_copy(loss)

    def _balance_sums(self, outputs: BaseModelOutput, batch: Batch, before: Tensor | None) -> Tensor | None:
        """The sums of the experts' balance up to this stage (models/router.py); None if it is not wanted."""
        if not self._balances:
            return None
        logits = outputs.router_logits if isinstance(outputs, MoeModelOutputWithPast) else None
        counted = batch.real_positions().reshape(-1)
        if logits:
            group = None if self.context is None else self.context.group
            own = balance_sums(logits, self._choices, counted, group)
        else:
            own = torch.zeros(2 * self._num_experts + 1, device=counted.device)
        sums = own if before is None else before + own
        # what goes to another stage gets a gradient back, also where no router here has one
        return sums if sums.requires_grad or not torch.is_grad_enabled() else sums.requires_grad_()

    @property
    def _balances(self) -> bool:
        """Whether the experts' balance goes with the hidden states from stage to stage."""
        knows = "output_router_logits" in self._inner.config.to_dict()
        return self.balance_experts and self._head is not None and knows

    @property
    def _num_experts(self) -> int:
        config = self._inner.config
        return getattr(config, "num_local_experts", None) or config.num_experts

    @property
    def _choices(self) -> int:
        """Experts that a token chooses."""
        return experts_per_token(self._inner.config)

    def _as_copy(self, loss: Tensor) -> Tensor:
        """A router loss whose gradient is this rank's share, where several compute the same."""
        return loss if self.router_copies == 1 else scale_gradient(loss, 1.0 / self.router_copies)
