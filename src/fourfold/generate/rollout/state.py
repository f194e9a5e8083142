"""What is known of every row that is being answered, on the device, so that steps follow each other without the host.

Shape legend: R slots, M tokens of the longest answer, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fourfold.generate.rollout.sampler import Choice


class RowState:
    """State of R slots; all of it is written in place.

    Attributes:
        tokens: [R] int64, the last token of each, which is not in the cache yet.
        lengths: [R] int64, positions in the cache.
        counts: [R] int64, tokens of the answer so far.
        limits: [R] int64, how many it may have.
        keys: [R] int32, of the noise (sampler.state_of).
        done: [R] bool; such a row goes along but does not change.
        answers: [R, M + 1] int64; the last column takes what done rows would write.
        logprobs: [R, M + 1] fp32, or None.
        seen: [R, V] bool, tokens of prompt and answer; None without a repetition penalty.
    """

    def __init__(
        self,
        num_rows: int,
        longest: int,
        stop_token_ids: Sequence[int],
        device: torch.device,
        *,
        logprobs: bool,
        num_tokens: int | None,
    ) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.tokens, self.lengths, self.counts, self.limits = (zeros(num_rows) for _ in range(4))
        self.keys = zeros(num_rows, dtype=torch.int32)
        self.done = torch.ones(num_rows, dtype=torch.bool, device=device)
        self.answers = zeros(num_rows, longest + 1)
        self.logprobs = zeros(num_rows, longest + 1, dtype=torch.float32) if logprobs else None
        self.seen = None if num_tokens is None else zeros(num_rows, num_tokens, dtype=torch.bool)
        self._stop, self._longest = torch.tensor(list(stop_token_ids), dtype=torch.int64, device=device), longest

    def enter(self, rows: Tensor, prompts: Sequence[Sequence[int]], limits: Sequence[int], keys: Sequence[int]) -> None:
        """Begin answers in some slots, [N] int64; the prompts are about to be put into the cache."""
        device = rows.device
        self.lengths[rows] = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self.limits[rows] = torch.tensor(limits, device=device)
        self.keys[rows] = torch.tensor(keys, dtype=torch.int32, device=device)
        self.counts[rows] = 0
        self.done[rows] = False
        if self.seen is not None:
            self.seen[rows] = False
            for row, prompt in zip(rows, prompts, strict=True):
                self.seen[row].index_fill_(0, torch.tensor(list(prompt), device=device), True)

    def record(self, rows: Tensor, choice: Choice) -> None:
        """Append what was chosen to the answers of some slots, [N] int64, that are not done."""
        counts, live = self.counts[rows], ~self.done[rows]
        columns = torch.where(live, counts, self._longest)
        self.answers[rows, columns] = choice.tokens
        if self.logprobs is not None:
            assert choice.logprobs is not None
            self.logprobs[rows, columns] = choice.logprobs
        if self.seen is not None:
            # not `= True`, which copies the number from the host: a graph cannot record that
            self.seen.index_put_((rows, choice.tokens), torch.ones_like(live))
        self.tokens[rows] = choice.tokens
        self.counts[rows] = counts = counts + live
        stopped = (choice.tokens[:, None] == self._stop).any(-1)
        self.done[rows] = ~live | stopped | (counts >= self.limits[rows])

    def advance(self, count: int) -> None:
        """The last token of the first `count` rows is in the cache; what done rows have there does not count."""
        self.lengths[:count] += ~self.done[:count]

    def move(self, sources: Tensor, targets: Tensor) -> None:
        """Copy some slots into others, none of which is both, and leave the former done."""
        held = (self.tokens, self.lengths, self.counts, self.limits, self.keys, self.done, self.answers)
        for tensor in (*held, self.logprobs, self.seen):
            if tensor is not None:
                tensor[targets] = tensor[sources]
        self.done[sources] = True

    def finished(self, count: int) -> list[bool]:
        """Which of the first rows are done; waits for the device."""
        return self.done[:count].tolist()

    def answer(self, row: int) -> tuple[list[int], list[float]]:
        """Tokens and log-probabilities of a slot."""
        count = int(self.counts[row])
        return self.answers[row, :count].tolist(), [] if self.logprobs is None else self.logprobs[row, :count].tolist()
