"""The one training loop. It knows steps, and when to log, evaluate and save; never the backend or the stage."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fourfold.base.errors import ConfigError, RunInterruptedError
from fourfold.base.log import get_logger
from fourfold.base.start_clock import StartClock
from fourfold.dataset.batch import Batch
from fourfold.dataset.collate import CutPolicy
from fourfold.dataset.loader import Loader, StepSamples
from fourfold.parallel.reduce import GradientNorm, gradient_norm
from fourfold.parallel.step import Running, Step, StepResult
from fourfold.parallel.sums import numbers_of
from fourfold.trackers.interface import Tracker
from fourfold.training.ahead import Ahead
from fourfold.training.clipping import clip_for
from fourfold.training.evaluate import Evaluator
from fourfold.training.interrupt import StopRequest
from fourfold.training.memory import peak_memory_figures
from fourfold.training.practice import Practice, Practised
from fourfold.training.schedule import Cadence
from fourfold.training.state import TrainState
from fourfold.training.step_times import StepTimes

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class LoopSettings:
    """What the loop needs to know of the config.

    Attributes:
        max_steps: optimizer steps of the run.
        steps_per_epoch: optimizer steps of one epoch.
        max_grad_norm: gradients are clipped to this 2-norm; 0 for no clipping.
        logging, evaluation, saving: when each is due.
        flos_per_token: floating-point operations counted for a token.
        early_stopping: evaluations without a better one after which the run ends; None for never.
        evaluate_first: evaluate before the first step, too.
        save_best: also save when an evaluation is the best so far.
        metric, greater_is_better: what is best; no metric if nothing hangs on it.
        schedule_follows_metric: the schedule moves with the metric after each evaluation, not with the steps.
    """

    max_steps: int
    steps_per_epoch: int
    max_grad_norm: float
    logging: Cadence
    evaluation: Cadence
    saving: Cadence
    flos_per_token: float = 0.0
    early_stopping: int | None = None
    evaluate_first: bool = False
    save_best: bool = False
    metric: str | None = None
    greater_is_better: bool = False
    schedule_follows_metric: bool = False


class Window:
    """Tokens and time since the last logged step."""

    def __init__(self) -> None:
        self.tokens = 0
        self._start = time.perf_counter()

    def speed(self, remaining_steps: int, steps: int) -> dict[str, float]:
        seconds = max(time.perf_counter() - self._start, 1e-9)
        return {"tokens_per_sec": self.tokens / seconds, "remaining_s": seconds / max(steps, 1) * remaining_steps}


@dataclass(frozen=True, slots=True)
class _Begun:
    """A step that the device has been given.

    Attributes:
        step: its number; the first is 1.
        read: waits for it; its figures, and the gradient's norm before it was clipped.
        rate: the learning rate that it was given.
        tokens: its input tokens of all ranks.
        all_tokens: those of the run with it.
    """

    step: int
    read: Callable[[], tuple[StepResult, float]]
    rate: float
    tokens: int
    all_tokens: int


@dataclass
class Loop:
    """Trains a model to the end of its budget.

    Attributes:
        step: runs forward and backward.
        module: the model; its trained parameters are clipped.
        save: writes a checkpoint of the current state and returns its folder.
        begin_micro_batch: called with step and number before each micro-batch; keys the randomness.
        scaler: scales the loss under fp16.
        evaluator: evaluates, or None.
        gradient_norm: measures the gradients of the given parameters, over all ranks.
        practice: turns the prompts of a step into what is trained on; None trains on the samples themselves.
        step_times: of this process's steps, without loading data, evaluating and saving.
        clock: runs since the command was given, and is ended by the first step.
    """

    settings: LoopSettings
    step: Step
    module: nn.Module
    loader: Loader
    policy: CutPolicy
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    state: TrainState
    trackers: list[Tracker]
    save: Callable[[], Path]
    begin_micro_batch: Callable[[int, int], None]
    scaler: torch.amp.GradScaler | None = None
    evaluator: Evaluator | None = None
    gradient_norm: GradientNorm = gradient_norm
    practice: Practice | None = None
    step_times: StepTimes = field(default_factory=StepTimes)
    clock: StartClock = field(default_factory=StartClock)
    _figures: dict[str, float] = field(default_factory=dict)
    _table: list[dict[str, Any]] = field(default_factory=list)
    _window: Window = field(default_factory=Window)
    _unread: _Begun | None = None
    _turn_started: float = 0.0

    def fit(self) -> None:
        """Train until the budget is spent, early stopping says so, or a signal asks for the end.

        Raises:
            RunInterruptedError: by a signal, after saving.
        """
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.module.train()
        if self.practice is not None:
            self.practice.restore(self.state.practice)
        self.clock.lap("preparation")
        if self.settings.evaluate_first and self.evaluator is not None and self.state.step == 0:
            self._evaluate(self.evaluator)
            self.clock.lap("evaluation")
        with StopRequest() as stop:
            reducer = self.step.reducer
            ahead = Ahead(iter(self.loader.steps(self.state.step)), self.policy)
            while not self._finished() and (found := ahead.next()) is not None:
                self._turn_started = time.perf_counter()
                begun = self._train_step(found, parameters, ahead)
                self._read()  # what the step before found, while the device does this one
                self._unread = begun
                # A signal may reach ranks at different steps; they leave together, after the same one.
                signal_number = reducer.largest(stop.signal_number or 0)
                if signal_number or not self._may_read_later():
                    self._read()
                seconds = self._turn_seconds()  # a step or the one before has been waited for
                self.state.train_runtime_s += seconds
                self.step_times.add(seconds)
                self.clock.end("first step")
                self._after_step(signal_number)
            self._read()

    def _finished(self) -> bool:
        return self.state.step >= self.settings.max_steps or self._lost_patience()

    def _lost_patience(self) -> bool:
        patience = self.settings.early_stopping
        return patience is not None and self.state.evaluations_since_best >= patience

    def _may_read_later(self) -> bool:
        """Whether nothing needs what a step found before the next one is begun: the device need not wait for it then.

        The same on all ranks. The first step is read at once, so that what was started is known to run.
        """
        settings, step = self.settings, self.state.step
        due = self._is_due(settings.saving, step) or self._is_due(settings.evaluation, step)
        # a CPU has done the next step when it is given: a line would come a step late
        due = due or (self.step.device.type == "cpu" and self._is_due(settings.logging, step))
        last = step >= settings.max_steps
        return self.practice is None and not (due or last) and self.scaler is None and self.clock.ended

    def _is_due(self, cadence: Cadence, step: int) -> bool:
        """Whether a cadence meets a step, which may be the last."""
        return cadence.due(step, last=step >= self.settings.max_steps)

    def _train_step(self, found: StepSamples, parameters: list[nn.Parameter], ahead: Ahead) -> _Begun:
        """Give a step to the device."""
        practised = Practised([found.samples]) if self.practice is None else self.practice.practise(found)
        self._table = practised.table
        rate = self.optimizer.param_groups[0]["lr"]
        *first, last = practised.updates
        earlier: list[StepResult] = []
        stepped = False
        for number, samples in enumerate(first):
            running, _, done = self._update(ahead.cut(samples), parameters, self._begin(found.step, number))
            earlier.append(running.read())
            stepped |= done
        running, norm, done = self._update(ahead.cut(last), parameters, self._begin(found.step, len(first)))
        stepped |= done
        if self.practice is None and found.step + 1 < self.settings.max_steps:
            ahead.prepare()  # all is given to the device, and not yet waited for
        if stepped and not self.settings.schedule_follows_metric:
            self.scheduler.step()
        if self.practice is not None:
            self.state.practice = self.practice.state()

        norm_there = numbers_of([norm])

        def read() -> tuple[StepResult, float]:
            result = merge([*earlier, running.read()])
            return replace(result, metrics={**practised.figures, **result.metrics}), norm_there()[0]

        num_tokens = sum(result.num_tokens for result in earlier) + running.num_tokens
        self._advance(found, num_tokens)
        return _Begun(found.step + 1, read, float(rate), num_tokens, self.state.num_tokens)

    def _begin(self, step: int, update: int) -> Callable[[int], None]:
        """What keys the randomness of an update's micro-batches, by number: those of all updates of a step apart."""
        return lambda number: self.begin_micro_batch(step, update * _MICRO_BATCHES + number)

    def _update(
        self, batches: Sequence[Batch], parameters: list[nn.Parameter], before: Callable[[int], None]
    ) -> tuple[Running, Tensor, bool]:
        """One update of the weights, which the device has not yet done.

        Returns:
            the step, the gradient's norm before it was clipped, and whether the weights are changed.
        """
        self.optimizer.zero_grad(set_to_none=self.step.graphs is None or not self.step.graphs.are_recorded)
        running = self.step.begin(batches, before=before)
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norm = clip_for(self.optimizer, parameters, self.settings.max_grad_norm, self.gradient_norm)
        return running, norm, self._optimizer_step()

    def _optimizer_step(self) -> bool:
        """Update the weights; False when fp16 overflowed and the step was skipped."""
        if self.scaler is None:
            self.optimizer.step()
            return True
        before = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return self.scaler.get_scale() >= before

    def _advance(self, found: StepSamples, num_tokens: int) -> None:
        """Count a step that was begun."""
        state = self.state
        state.step = found.step + 1
        state.epoch = state.step / self.settings.steps_per_epoch
        state.num_samples += found.num_samples
        state.num_tokens += num_tokens
        state.total_flos += self.settings.flos_per_token * num_tokens
        for tracker in self.trackers:
            tracker.advance(state.step)

    def _read(self) -> None:
        """Note what the last step has found, and log it if that is due, unless it is done already."""
        if self._unread is None:
            return
        begun, self._unread = self._unread, None
        result, norm = begun.read()
        state = self.state
        if math.isfinite(state.loss_sum) and not math.isfinite(result.loss):
            log.warning("loss: is %s at step %d. Lower learning_rate, or look at the data.", result.loss, begun.step)
        state.loss_sum += result.loss
        state.window_loss += result.loss
        state.window_steps += 1
        extra = result.terms if len(result.terms) > 1 else {}
        for name, value in {**extra, **result.metrics}.items():
            state.window_sums[name] = state.window_sums.get(name, 0.0) + value
            state.window_counts[name] = state.window_counts.get(name, 0) + 1
        self._window.tokens += begun.tokens
        self._figures = {"grad_norm": norm, "learning_rate": begun.rate}
        if self._is_due(self.settings.logging, begun.step):
            self._log(begun)

    def _turn_seconds(self) -> float:
        """Since the step that was begun last was asked for."""
        return time.perf_counter() - self._turn_started

    def _after_step(self, signal_number: int) -> None:
        settings, step = self.settings, self.state.step
        if self.evaluator is not None and self._is_due(settings.evaluation, step):
            self._evaluate(self.evaluator)
        if signal_number:
            where = f"Stopped at step {step} of {settings.max_steps}; saved as {self.save()}."
            ways_on = "Go on with resume_from_checkpoint=true."
            if self._finished():
                ways_on = "No step is left: resume_from_checkpoint=true writes the result into output_dir at once."
            raise RunInterruptedError(f"{where} {ways_on}", signal_number)
        if self._lost_patience() and step < settings.max_steps:
            log.info("Early stopping at step %d: %s has not improved lately.", step, settings.metric)
        if self._finished() or self._save_is_due():
            self.save()

    def _save_is_due(self) -> bool:
        is_best = self.settings.save_best and self.state.best_step == self.state.step
        return is_best or self.settings.saving.due(self.state.step, last=False)

    def _log(self, begun: _Begun) -> None:
        """The figures of the steps since the last line, the last of which has just been read."""
        state = self.state
        remaining = self.settings.max_steps - begun.step
        figures = {
            "loss": state.window_loss / state.window_steps,
            **self._figures,
            **{name: total / state.window_counts[name] for name, total in state.window_sums.items()},
            "epoch": begun.step / self.settings.steps_per_epoch,
            "num_tokens": float(begun.all_tokens),
            **self._window.speed(remaining, state.window_steps),
            "elapsed_s": state.train_runtime_s + self._turn_seconds(),
            **peak_memory_figures(),
        }
        state.window_loss, state.window_steps = 0.0, 0
        state.window_sums, state.window_counts = {}, {}
        self._window = Window()
        self._publish(figures, begun.step)
        for tracker in self.trackers if self._table else ():
            tracker.table(begun.step, "completions", self._table)

    def _evaluate(self, evaluator: Evaluator) -> None:
        figures = evaluator.run() | {"epoch": self.state.epoch}
        self._window = Window()
        self._publish(figures, self.state.step)
        name = self.settings.metric
        if name is None:
            return
        if name not in figures:
            given = ", ".join(key for key in figures if key != "epoch")
            raise ConfigError(f"metric_for_best_model: evaluation gives no {name}. Name one that it gives: {given}.")
        self._note_metric(figures[name])

    def _note_metric(self, metric: float) -> None:
        state, best = self.state, self.state.best_metric
        if self.settings.schedule_follows_metric:
            self.scheduler.step(metric)  # type: ignore[arg-type] - such schedules take the metric, not the epoch
        better = best is None or (metric > best if self.settings.greater_is_better else metric < best)
        if better and not math.isnan(metric):
            state.best_metric, state.best_step, state.evaluations_since_best = metric, state.step, 0
        else:
            state.evaluations_since_best += 1

    def _publish(self, figures: dict[str, float], step: int) -> None:
        row: dict[str, Any] = {key: value for key, value in figures.items() if key not in _MACHINE_FIGURES}
        self.state.log_history.append({**row, "step": step})
        for tracker in self.trackers:
            tracker.log(step, figures)


_MICRO_BATCHES = 1 << 16
"""More than an update has."""


def merge(results: Sequence[StepResult]) -> StepResult:
    """Several updates as one step: means of their figures, and all their tokens."""
    if len(results) == 1:
        return results[0]
    last = results[-1]
    terms = {name: sum(r.terms.get(name, 0.0) for r in results) / len(results) for name in last.terms}
    metrics = {name: sum(r.metrics.get(name, 0.0) for r in results) / len(results) for name in last.metrics}
    return replace(last, terms=terms, metrics=metrics, num_tokens=sum(r.num_tokens for r in results))


_MACHINE_FIGURES = {"tokens_per_sec", "elapsed_s", "remaining_s", "peak_memory_gib", "reserved_memory_gib"}
"""Figures of the machine and the moment; left out of the history, which a resumed run repeats exactly."""
