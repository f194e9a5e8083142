"""The loop that answers prompts: admits them to free slots, takes steps, collects what is finished.

A round is a few forward passes over new prompts, then a few steps of all rows, then one look at what is done. Rows in
work are always the first slots: a new prompt takes a free one among them, and otherwise the last row moves there.

Ranks whose forward passes need each other (sharded weights, shared experts) agree each round on how many passes there
are; one with nothing left to do runs them on a filler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fourfold.generate.interface import Sampling
from fourfold.generate.rollout.cache import PromptPositions, Slots, StepPositions
from fourfold.generate.rollout.graphs import Graphs
from fourfold.generate.rollout.passes import Passes
from fourfold.generate.rollout.sampler import choose
from fourfold.generate.rollout.state import RowState

_PASS_TOKENS = 4096
"""Prompt tokens of one forward pass, unless a single prompt has more."""
_STEPS_ON_GPU = 16
"""Steps between two looks at what is done, each of which waits for the device; a CPU looks after every step."""
_KEYS = 16
"""Rows are looked at up to a multiple of this."""

Agree = Callable[[int, int], tuple[int, int]]
"""Two numbers of this rank -> the largest of each over the ranks whose forward passes need each other."""


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt to answer.

    Attributes:
        limit: tokens of its answer at most.
        key: of its noise, see sampler.state_of.
    """

    prompt: Sequence[int]
    limit: int
    key: int

    @property
    def size(self) -> int:
        """Positions that it may take."""
        return len(self.prompt) + self.limit


@dataclass(frozen=True, slots=True)
class Answer:
    """Tokens with the stop token, if it came to one, and their log-probabilities, if asked for."""

    tokens: list[int]
    logprobs: list[float]


@dataclass
class _Row:
    """A request in work, as the host knows it: `count` tokens of its answer at most are there."""

    number: int
    request: Request
    count: int = 0

    @property
    def left(self) -> int:
        return self.request.limit - self.count

    @property
    def length(self) -> int:
        return len(self.request.prompt) + self.count


class Loop:
    """Answers requests; used once.

    Args:
        requests: every one has a limit of at least 1.
        batch_tokens: positions of all slots together at most, unless a single one has more.
        agree: see Agree; None where no other rank's passes are needed.
        graphs: replay steps as CUDA graphs.
    """

    def __init__(
        self,
        passes: Passes,
        requests: Sequence[Request],
        sampling: Sampling,
        device: torch.device,
        *,
        stop_token_ids: Sequence[int],
        pad_token_id: int,
        batch_tokens: int,
        logprobs: bool,
        agree: Agree | None,
        graphs: bool,
    ) -> None:
        self._passes, self._requests, self._sampling, self._device = passes, requests, sampling, device
        self._pad, self._logprobs, self._agree = pad_token_id, logprobs, agree
        # longest first, so that rows of one time are alike
        self._waiting = sorted(range(len(requests)), key=lambda i: (requests[i].size, -i))
        self._rows: dict[int, _Row] = {}
        self._answers: dict[int, Answer] = {}
        self._graphs = Graphs(self._step) if graphs else None
        self._keys = 256 if graphs else 64 if device.type == "cuda" else _KEYS
        capacity = _up(max((request.size for request in requests), default=1), self._keys)
        self._num_rows = max(min(len(requests), batch_tokens // capacity), 1)
        num_slots = self._bucket(self._num_rows)
        self._slots = Slots(num_slots, capacity)
        self._state = RowState(
            num_slots,
            max((request.limit for request in requests), default=1),
            stop_token_ids,
            device,
            logprobs=logprobs,
            num_tokens=passes.num_tokens if sampling.repetition_penalty != 1 else None,
        )

    def run(self) -> list[Answer]:
        """The answers, in the order of the requests."""
        while True:
            groups = self._admit()
            wanted = len(groups), self._num_steps()
            num_groups, num_steps = wanted if self._agree is None else self._agree(*wanted)
            if num_groups == num_steps == 0:
                return [self._answers[number] for number in range(len(self._requests))]
            for index in range(num_groups):
                self._read_prompts(groups[index] if index < len(groups) else [])
            self._take_steps(num_steps)
            self._collect()

    # Prompts.

    def _admit(self) -> list[list[int]]:
        """Give waiting prompts the free slots; which slots are read in which forward pass."""
        groups: list[list[int]] = []
        tokens = 0
        for slot in range(self._num_rows):
            if slot in self._rows or not self._waiting:
                continue
            number = self._waiting.pop()
            self._rows[slot] = _Row(number, self._requests[number])
            tokens += self._rows[slot].length
            if not groups or tokens > _PASS_TOKENS:
                groups.append([])
                tokens = self._rows[slot].length
            groups[-1].append(slot)
        self._close_gaps()
        return groups

    def _read_prompts(self, slots: list[int]) -> None:
        """One forward pass over the prompts of some slots, and the first token of each answer; a filler if none."""
        requests = [self._rows[slot].request for slot in slots]
        prompts = [request.prompt for request in requests]
        lengths = [len(prompt) for prompt in prompts]
        total = sum(lengths)
        filler = _up(max(total, 1), self._passes.multiple) - total
        ids = [token for prompt in prompts for token in prompt] + [self._pad] * filler
        places = [place for length in (*lengths, filler) for place in range(length)]
        last = torch.tensor(lengths, dtype=torch.int64).cumsum(0) - 1 if slots else torch.zeros(1, dtype=torch.int64)
        held = self._slots if slots else None
        logits = self._passes.logits(
            torch.tensor([ids]).to(self._device, non_blocking=True),
            torch.tensor([places]).to(self._device, non_blocking=True),
            last.to(self._device, non_blocking=True),
            PromptPositions(held, lengths, slots, filler, self._device),
        )
        if not slots:
            return
        rows = torch.tensor(slots, device=self._device)
        self._state.enter(rows, prompts, [r.limit for r in requests], [r.key for r in requests])
        self._choose(rows, logits)
        for slot in slots:
            self._rows[slot].count = 1

    # Steps.

    def _num_steps(self) -> int:
        """Steps of this round, before the first of which new prompts have got their first token."""
        most = _STEPS_ON_GPU if self._device.type == "cuda" else 1
        return min(most, max((min(row.left, row.request.limit - 1) for row in self._rows.values()), default=0))

    def _take_steps(self, count: int) -> None:
        if not self._rows:
            for _ in range(count):
                self._read_prompts([])
            return
        num_rows = self._bucket(len(self._rows))
        longest = max(min(row.length + count, row.request.size) for row in self._rows.values())
        num_keys = min(_up(longest, self._keys), self._slots.capacity)
        step = self._step if self._graphs is None else self._graphs
        for _ in range(count):
            step(num_rows, num_keys)
        for row in self._rows.values():
            row.count = min(row.count + count, row.request.limit)

    def _step(self, num_rows: int, num_keys: int) -> None:
        """The next token of each of the first rows; nothing in here waits for the device."""
        lengths = self._state.lengths[:num_rows]
        positions = StepPositions(self._slots, lengths, num_keys)
        logits = self._passes.logits(self._state.tokens[None, :num_rows], lengths[None], None, positions)
        self._state.advance(num_rows)
        self._choose(torch.arange(num_rows, device=self._device), logits)

    def _choose(self, rows: Tensor, logits: Tensor | None) -> None:
        state, choice = self._state, None
        if logits is not None:
            seen = None if state.seen is None else state.seen[rows]
            choice = choose(logits, self._sampling, state.keys[rows], state.counts[rows], seen, logprobs=self._logprobs)
        state.record(rows, self._passes.shared(choice, len(rows), self._device, logprobs=self._logprobs))

    # What is finished.

    def _collect(self) -> None:
        """Take the answers that are complete; the only place where the host waits for the device."""
        if not self._rows:
            return
        done = self._state.finished(max(self._rows) + 1)
        for slot in [slot for slot in self._rows if done[slot]]:
            self._answers[self._rows.pop(slot).number] = Answer(*self._state.answer(slot))

    def _close_gaps(self) -> None:
        """Move the last rows into the free slots before them, so that rows in work are the first ones."""
        count = len(self._rows)
        targets = [slot for slot in range(count) if slot not in self._rows]
        if not targets:
            return
        sources = sorted(slot for slot in self._rows if slot >= count)
        moved = torch.tensor([sources, targets], device=self._device)
        self._slots.move(moved[0], moved[1], max(self._rows[slot].length for slot in sources))
        self._state.move(moved[0], moved[1])
        for source, target in zip(sources, targets, strict=True):
            self._rows[target] = self._rows.pop(source)

    def _bucket(self, num_rows: int) -> int:
        """Rows of a step's forward pass: few different numbers, where each is a graph of its own."""
        if self._graphs is not None:
            num_rows = _up(num_rows, 8) if num_rows > 4 else 1 << (num_rows - 1).bit_length()
        return _up(num_rows, self._passes.multiple)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
