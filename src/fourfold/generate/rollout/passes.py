"""Forward passes of a generating model under a layout: logits on the ranks that choose, choices on every rank."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fourfold.generate.rollout.cache import Positions
from fourfold.generate.rollout.sampler import Choice
from fourfold.models.forward import StepModel
from fourfold.models.unwrap import base_model
from fourfold.parallel.apply import Parallelized
from fourfold.parallel.stages import Part
from fourfold.parallel.vocabulary import join_logits, num_tokens


class Passes:
    """Runs a model on one packed row, whole or stage by stage.

    Attributes:
        multiple: S must be a multiple of this.
        num_tokens: of the vocabulary.
    """

    def __init__(self, model: StepModel, split: Parallelized) -> None:
        """Every rank must call: those that share a vocabulary tell each other how large it is."""
        self._model, self._pipeline = model, split.pipeline
        self._stages, self._last = split.reducer.pipeline, split.reducer.loss_rank
        self._share = split.vocabulary
        # with positions shared by tp ranks; those of cp ranks are not shared here
        self.multiple = split.multiple if split.context is None else split.multiple // split.context.num_chunks
        self.num_tokens: int = base_model(model.module).config.get_text_config().vocab_size
        if self._share is not None:
            self.num_tokens = num_tokens(self._share)

    def logits(self, ids: Tensor, places: Tensor, wanted: Tensor | None, positions: Positions) -> Tensor | None:
        """Logits of some positions of a row; every rank that shares the model must call at the same time.

        Args:
            ids, places: [1, S] int64, tokens and their positions.
            wanted: [N] int64, which of the S; None for all.
        Returns:
            [N, V], the same on all ranks of a stage; None where the last stage is another rank's.
        """
        if self._pipeline is None:
            found = self._model.next_logits(ids, places, wanted, rollout=positions)
            return self._joined(found)
        results: list[Tensor] = []

        def forward(part: Part, number: int, received: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden = received[0] if received else None
            found = self._model.next_logits(ids, places, wanted, part=part, received=hidden, rollout=positions)
            if not part.is_last:
                return (found,)
            results.append(self._joined(found))
            return ()

        cut = self._pipeline.cut
        self._pipeline.run(1, [((*ids.shape, cut.hidden_size), cut.dtype)], forward)
        return results[0] if results else None

    def _joined(self, logits: Tensor) -> Tensor:
        return logits if self._share is None else join_logits(logits, self._share, self.num_tokens)

    def shared(self, choice: Choice | None, count: int, device: torch.device, *, logprobs: bool) -> Choice:
        """What the last stage chose for `count` rows, on every rank of its pipeline."""
        if self._stages is None:
            assert choice is not None, "one rank has the whole model"
            return choice
        if choice is None:
            scores = torch.empty(count, device=device) if logprobs else None
            choice = Choice(torch.empty(count, dtype=torch.int64, device=device), scores)
        dist.broadcast(choice.tokens, self._last, self._stages)
        if choice.logprobs is not None:
            dist.broadcast(choice.logprobs, self._last, self._stages)
        return choice
