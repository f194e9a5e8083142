"""One optimizer step's forward and backward: the only place where sums are divided by their denominators."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from fourfold.dataset.batch import Batch
from fourfold.dataset.collate import equalize
from fourfold.parallel.exchange import add_up
from fourfold.parallel.gradients import GradientSync, NoSync, add_gradients
from fourfold.parallel.graphs import Graphs
from fourfold.parallel.loss import (
    Outputs,
    at_positions,
    at_temperature,
    document_logps,
    document_values,
    score_tokens,
)
from fourfold.parallel.pipeline import Pipeline, Wire
from fourfold.parallel.reduce import Reducer
from fourfold.parallel.stages import Part
from fourfold.parallel.sums import Figure, Sums, detached, not_zero
from fourfold.parallel.teacher import Teacher, TeacherStates
from fourfold.parallel.terms import LossTerms


class Scorer(Protocol):
    """What an objective may ask of the engine before a step is trained."""

    @property
    def reducer(self) -> Reducer:
        """Adds up over ranks."""
        ...

    def document_logps(self, batches: Sequence[Batch], *, reference: bool) -> list[Tensor]:
        """For each micro-batch the log-probabilities of its documents' targets, [D] fp32, no gradient.

        They are where they were computed, on a device that need not have done it yet, or on the host, where a rank of
        a pipeline had them sent. All ranks must call, with equally many micro-batches.

        Args:
            reference: under the model without its adapters.
        """
        ...

    def teacher_states(self, batches: Sequence[Batch]) -> TeacherStates:
        """What the run's second model makes of the micro-batches, no gradient.

        All ranks must call, with equally many micro-batches.
        """
        ...


class LossFunction(Protocol):
    """The calls of an objective that a step needs (objectives/interface.py)."""

    def prepare(self, batches: Sequence[Batch], scorer: Scorer) -> list[Batch]: ...

    def denominators(self, batches: Sequence[Batch]) -> dict[str, float]: ...

    def loss(self, outputs: Outputs, batch: Batch) -> LossTerms: ...


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step found out; every figure is a global one.

    Attributes:
        terms: parts of the loss by name, already divided.
        metrics: further quotients and figures to report.
        denominators: what they were divided by, by name.
        denominator_of: for each term and metric that is a quotient, the name of its denominator.
        num_tokens: input tokens without padding.
    """

    terms: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    denominators: dict[str, float] = field(default_factory=dict)
    denominator_of: dict[str, str] = field(default_factory=dict)
    num_tokens: int = 0

    @property
    def loss(self) -> float:
        """The sum of the terms: what was differentiated."""
        return sum(self.terms.values())


@dataclass(frozen=True, slots=True)
class Running:
    """A step that the device has been given, and may not have done yet.

    Attributes:
        num_tokens: input tokens of all ranks without padding.
        read: waits for the device and tells what the step found; every rank must call, in the same order, before the
            next step or once that has been begun.
    """

    num_tokens: int
    read: Callable[[], StepResult]


def whole(batch: Batch) -> Batch:
    """A micro-batch that this rank computes alone."""
    return batch


def nothing() -> None:
    """Gradients are complete after the last backward pass."""


def no_figures() -> Callable[[], dict[str, float]]:
    """Nothing is observed."""
    return dict


def _ignore(number: int) -> None:
    """No randomness to key."""


class StagedModel(Protocol):
    """A model that can be run one pipeline stage at a time."""

    def stage(self, batch: Batch, part: Part, received: tuple[Tensor, ...]) -> Outputs | tuple[Tensor, ...]:
        """What the stage before sent -> what goes to the next one, or the outputs of the last."""
        ...

    def wires(self, batch: Batch, hidden_size: int, dtype: torch.dtype) -> list[Wire]:
        """What goes from stage to stage for such a micro-batch."""
        ...


@dataclass(frozen=True, slots=True)
class Staged:
    """A pipeline and the model it runs."""

    pipeline: Pipeline
    model: StagedModel


@dataclass(frozen=True)
class Step:
    """Runs a model on the micro-batches of one optimizer step.

    Attributes:
        model: micro-batch on the device -> outputs.
        objective: outputs -> sums.
        device: where batches are moved to.
        autocast: context of the forward pass (a fresh one for each call).
        filler: a micro-batch that counts for nothing, for ranks that have fewer than others.
        scale: factor on the loss before backward (the gradient scaler's under fp16), None for 1.
        sync: when gradients travel between data-parallel ranks.
        reducer: adds up over ranks.
        localize: a micro-batch on the host -> the part of it that this rank computes.
        finish: completes the gradients after the last backward pass of a step.
        observe: begins to fetch further figures of the step that was trained; what it returns reads them, over all
            ranks.
        staged: runs the micro-batches through a pipeline instead of one after the other.
        module: the model, put into evaluation mode while it is only asked.
        asked: context of what is asked of it while it is trained.
        reference: within it the model is its own reference: adapters do nothing.
        teacher: the second model of a run that has one.
        graphs: what replays micro-batches; None where each is run as it is.
    """

    model: Callable[[Batch], Outputs]
    objective: LossFunction
    device: torch.device
    autocast: Callable[[], AbstractContextManager[object]]
    filler: Callable[[], Batch]
    scale: Callable[[Tensor], Tensor] | None = None
    sync: GradientSync = field(default_factory=NoSync)
    reducer: Reducer = field(default_factory=Reducer)
    localize: Callable[[Batch], Batch] = whole
    finish: Callable[[], None] = nothing
    observe: Callable[[], Callable[[], dict[str, float]]] = no_figures
    staged: Staged | None = None
    module: nn.Module | None = None
    asked: Callable[[], AbstractContextManager[object]] = nullcontext
    reference: Callable[[], AbstractContextManager[object]] = nullcontext
    teacher: Teacher | None = None
    graphs: Graphs | None = None

    def forward_backward(
        self,
        batches: Sequence[Batch],
        *,
        before: Callable[[int], None] | None = None,
    ) -> StepResult:
        """Accumulate the gradient of the whole step's loss.

        Args:
            batches: this rank's micro-batches, on the host; ranks may have different numbers of them, also none.
            before: called with its number before each micro-batch (seeds the randomness).
        """
        return self.begin(batches, before=before).read()

    def begin(self, batches: Sequence[Batch], *, before: Callable[[int], None] | None = None) -> Running:
        """The same, without waiting for the device."""
        running = self._run(batches, before or _ignore)
        self.finish()
        observed = self.observe()

        def read() -> StepResult:
            found = running.read()
            return replace(found, metrics={**found.metrics, **observed()})

        return replace(running, read=read)

    def forward(self, batches: Sequence[Batch]) -> StepResult:
        """The same figures without a gradient, for evaluation."""
        return self.begin_forward(batches).read()

    @torch.no_grad()
    def begin_forward(self, batches: Sequence[Batch]) -> Running:
        """The same, without waiting for the device."""
        return self._run(batches, _ignore)

    def _run(self, batches: Sequence[Batch], before: Callable[[int], None]) -> Running:
        """All micro-batches, forward and (where gradients are enabled) backward."""
        ready = self.objective.prepare(self.fill(batches), self)
        counts = self._counts(ready)
        sums, denominators = Sums(), not_zero(counts)

        def loss_of(outputs: Outputs, batch: Batch) -> Tensor:
            loss, found = self._loss(outputs, batch, denominators)
            sums.add(found)
            return loss

        if self.graphs is not None and torch.is_grad_enabled() and all(map(self.graphs.takes, ready)):
            for batch in ready:
                sums.add(self.graphs.run(self.localize(batch), denominators))
        else:
            self._pass(ready, before, loss_of)
        return Running(round(counts[_TOKENS]), partial(self._result, sums.figures(), counts))

    def _loss(
        self, outputs: Outputs, batch: Batch, denominators: Mapping[str, float | Tensor]
    ) -> tuple[Tensor, LossTerms]:
        """What is differentiated, and the sums it is made of."""
        found = self.objective.loss(outputs, batch)
        parts = [term.total / denominators[term.denominator] for term in found.terms.values()]
        loss = torch.stack(parts).sum()
        return loss if self.scale is None else self.scale(loss), found

    def work(self, batch: Batch, denominators: dict[str, Tensor], *, parameters: Sequence[nn.Parameter]) -> LossTerms:
        """One micro-batch on the device, forward and backward: what `graphs` records.

        Args:
            parameters: all that are trained, with gradients that are added to.
        """
        with self.autocast():
            loss, found = self._loss(self.model(batch), batch, denominators)
        add_gradients(loss, parameters)
        return detached(found)

    def document_logps(self, batches: Sequence[Batch], *, reference: bool) -> list[Tensor]:
        """See `Scorer`."""
        with self.reference() if reference else nullcontext():
            return self._asked_for(batches, document_logps)

    def document_values(self, batches: Sequence[Batch]) -> list[Tensor]:
        """For each micro-batch the values at its documents' last tokens, [D] fp32 on the host, no gradient.

        All ranks must call, with equally many micro-batches; the model has a value head.
        """
        return self._on_host(batches, document_values)

    def _on_host(self, batches: Sequence[Batch], read: Callable[[Outputs, Batch], Tensor]) -> list[Tensor]:
        """What is read from the outputs of each micro-batch, on the host of every rank."""
        return [tensor.cpu() for tensor in self._asked_for(batches, read)]

    def _asked_for(self, batches: Sequence[Batch], read: Callable[[Outputs, Batch], Tensor]) -> list[Tensor]:
        """What is read from the outputs of each micro-batch, on every rank; sent through the host in a pipeline."""
        found: list[Tensor] = []

        def note(outputs: Outputs, batch: Batch) -> Tensor:
            found.append(read(outputs, batch).detach())
            return outputs.hidden.new_zeros(())

        with torch.no_grad(), self._asked():
            self._pass(batches, _ignore, note)
        return found if self.staged is None else self.reducer.from_last_stage([tensor.cpu() for tensor in found])

    def token_logps(self, batches: Sequence[Batch], *, reference: bool, temperature: float = 1.0) -> list[Tensor]:
        """For each micro-batch the log-probability of every target, [B, S] fp32 on the host, 0 where there is none.

        All ranks must call, with equally many micro-batches (`fill`).

        Args:
            reference: under the model without its adapters.
            temperature: that logits are divided by.
        """

        def read(outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor]:
            scores = score_tokens(at_temperature(outputs, temperature), batch.targets)
            return -scores.nll, scores.positions

        with self.reference() if reference else nullcontext():
            return self._ask_tokens(batches, read)

    def token_values(self, batches: Sequence[Batch]) -> list[Tensor]:
        """For each micro-batch what the value head says where a target is to be predicted, as `token_logps`."""

        def read(outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor]:
            positions = outputs.positions_of(batch.targets)
            return outputs.values_at(positions), positions

        return self._ask_tokens(batches, read)

    def _ask_tokens(
        self, batches: Sequence[Batch], read: Callable[[Outputs, Batch], tuple[Tensor, Tensor]]
    ) -> list[Tensor]:
        """For each micro-batch [B, S] fp32 on the host.

        Args:
            read: values [N] and flat positions [N] of the part of a micro-batch that this rank computes.
        """
        placed = [replace(batch, numbers={**batch.numbers, _PLACE: _places(batch)}) for batch in batches]

        def whole(outputs: Outputs, batch: Batch) -> Tensor:
            values, positions = read(outputs, batch)
            size = sum(map(sum, batch.whole_rows)) if batch.whole_rows else batch.input_ids.numel()
            places = batch.numbers[_PLACE].reshape(-1).index_select(0, positions).long()
            found = values.new_zeros(size).index_copy(0, places, values.detach())
            return found if outputs.positions is None else add_up(found, outputs.positions)

        found = self._on_host(placed, whole)
        return [_as_rows(value, batch) for value, batch in zip(found, batches, strict=True)]

    def rest(self, *, but_head: bool = False) -> None:
        """Leave weights as they are between steps: a pass without gradients may leave some gathered, and who lists
        the parameters then (an optimizer that is built, say) would get the gathered ones.

        Args:
            but_head: leave gathered what is outside the layers.
        """
        if self.module is None:
            return
        units = [module for module in self.module.modules() if isinstance(module, FSDPModule)]
        for module in units[1:] if but_head else units:
            module.reshard()

    def teacher_states(self, batches: Sequence[Batch]) -> TeacherStates:
        """See `Scorer`."""
        assert self.teacher is not None, "a run with a second model"
        return self.teacher.states(batches)

    @torch.no_grad()
    def states(self, batches: Sequence[Batch]) -> TeacherStates:
        """This model's own last hidden states; see `Scorer.teacher_states`."""
        hidden: list[Tensor] = []
        found = TeacherStates()

        def read(outputs: Outputs, batch: Batch) -> Tensor:
            nonlocal found
            # Copied while the device goes on; what is copied back later is ordered after it.
            states = at_positions(outputs.hidden, outputs.positions_of(batch.targets))
            hidden.append(states.to("cpu", non_blocking=True))
            found = TeacherStates((), outputs.head, outputs.vocabulary)
            return outputs.hidden.new_zeros(())

        self._pass(batches, _ignore, read)
        return replace(found, hidden=tuple(hidden))

    @contextmanager
    def _asked(self) -> Iterator[None]:
        """Dropout and noise rest."""
        training = self.module is not None and self.module.training
        if self.module is not None and training:
            self.module.eval()
        try:
            with self.asked() if training else nullcontext():  # an evaluation asks as it scores
                yield
        finally:
            if self.module is not None and training:
                self.module.train()

    def _pass(
        self, batches: Sequence[Batch], before: Callable[[int], None], loss_of: Callable[[Outputs, Batch], Tensor]
    ) -> None:
        if self.staged is None:
            self._one_by_one(batches, before, loss_of)
        else:
            self._through_stages(self.staged, batches, before, loss_of)

    def _one_by_one(
        self, batches: Sequence[Batch], before: Callable[[int], None], loss_of: Callable[[Outputs, Batch], Tensor]
    ) -> None:
        for number, batch in enumerate(batches):
            before(number)
            on_device = self.localize(batch).with_scored().to(self.device)
            with self.sync.micro_batch(last=number == len(batches) - 1):
                with self.autocast():
                    loss = loss_of(self.model(on_device), on_device)
                if torch.is_grad_enabled():
                    loss.backward()

    def _through_stages(
        self,
        staged: Staged,
        batches: Sequence[Batch],
        before: Callable[[int], None],
        loss_of: Callable[[Outputs, Batch], Tensor],
    ) -> None:
        local = [self.localize(batch).with_scored() for batch in equalize(batches)]
        # what an objective has put beside them may be large; it is moved when it is needed
        on_device = [replace(batch, extras={}).to(self.device) for batch in local]

        def forward(part: Part, number: int, received: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            before(number)
            with self.autocast():
                found = staged.model.stage(on_device[number], part, received)
                if not isinstance(found, Outputs):
                    return found
                extras = local[number].extras_on(self.device)
                return (loss_of(found, replace(on_device[number], extras=extras)),)

        cut = staged.pipeline.cut
        wires = staged.model.wires(on_device[0], cut.hidden_size, cut.dtype)
        staged.pipeline.run(len(on_device), wires, forward)

    def fill(self, batches: Sequence[Batch]) -> list[Batch]:
        """As many micro-batches as the rank with most has, and a pipeline needs."""
        count = max(self.reducer.largest(len(batches)), 1)
        if self.staged is not None:
            count = self.staged.pipeline.count(count)
        return [*batches, *(self.filler() for _ in range(count - len(batches)))]

    def _counts(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Over all ranks the denominators and the tokens, counted on whole micro-batches: ranks that share one count
        the same."""
        tokens = float(sum(batch.num_tokens for batch in batches))
        return self.reducer.counts({**self.objective.denominators(batches), _TOKENS: tokens})

    def _result(self, figures: Callable[[], list[Figure]], counts: dict[str, float]) -> StepResult:
        """Global figures: this rank's sums, added up over ranks, divided once."""
        found = self.reducer.from_last_stage(figures())
        totals = self.reducer.sums({figure.name: figure.total for figure in found})
        denominators = {name: count for name, count in counts.items() if name != _TOKENS}
        quotients = {f.name: totals[f.name] / max(denominators[f.denominator], 1e-12) for f in found}
        return StepResult(
            terms={f.name: quotients[f.name] for f in found if f.is_term},
            metrics={f.name: quotients[f.name] for f in found if not f.is_term},
            denominators=denominators,
            denominator_of={f.name: f.denominator for f in found},
            num_tokens=round(counts[_TOKENS]),
        )


_TOKENS = "__tokens__"
_PLACE = "__place__"


def _places(batch: Batch) -> Tensor:
    """[B, S] fp32: where each position is; exact up to 2^24."""
    return torch.arange(batch.input_ids.numel(), dtype=torch.float32).view(batch.input_ids.shape)


def _as_rows(values: Tensor, batch: Batch) -> Tensor:
    """Flat values of a micro-batch that a pipeline may have widened -> [B, S]."""
    rows, width = batch.input_ids.shape
    return values[: rows * width].view(rows, width)
