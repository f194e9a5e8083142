"""A reward model that scores answers by itself, whole on one device: for PPO, GRPO and whoever has tokens to score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from fourfold.config.schema import Run
from fourfold.dataset.batch import IGNORE_INDEX, Example, Sample
from fourfold.dataset.collate import CutPolicy, cut
from fourfold.models.forward import StepModel, supports_packing
from fourfold.models.inference import inference_dtype, load_for_inference
from fourfold.models.value_head import add_value_head
from fourfold.parallel.loss import document_values

_TOKENS, _CPU_TOKENS = 16384, 512
"""Positions of one forward pass: of a GPU, and of a CPU, where more are no faster."""


@dataclass(frozen=True, slots=True)
class RewardScorer:
    """Base model, adapters and value head, in evaluation mode.

    Attributes:
        model: as a step runs it.
        device: where it computes.
        max_tokens: positions of one forward pass at most; a single longer sequence still makes one.
    """

    model: StepModel
    device: torch.device
    max_tokens: int

    @classmethod
    def load(
        cls,
        run: Run,
        device: torch.device,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        dtype: torch.dtype | None = None,
        max_tokens: int | None = None,
    ) -> RewardScorer:
        """The reward model that `model_name_or_path` and `adapter_name_or_path` of a run name.

        Args:
            tokenizer: needed where the config adds tokens to it.
            dtype: of the weights that are not quantised; default: as `infer_dtype` says. The head is in fp32.
        Raises:
            ModelError: it cannot be loaded, or has no value head; the message names it.
            ConfigError: keys that contradict each other.
        """
        module = load_for_inference(run, tokenizer, device, dtype or inference_dtype(run.model, device))
        add_value_head(module, run.model, seed=0, trainable=False, required=True)
        module.eval()
        if max_tokens is None:
            max_tokens = _CPU_TOKENS if device.type == "cpu" else _TOKENS
        return cls(StepModel(module, packed=supports_packing(module)), device, max_tokens)

    @torch.no_grad()
    def score(self, token_ids: Sequence[Sequence[int]]) -> list[float]:
        """The reward of each sequence: the value at its last token.

        Args:
            token_ids: prompts with their answers, as the reward model was trained on them: with the template's tokens
                and the end of the answer. None of them is empty.
        Raises:
            ValueError: one is.
        """
        if not all(token_ids):
            raise ValueError("a sequence without tokens has no reward")
        samples = [
            Sample({"": Example(list(ids), [IGNORE_INDEX] * len(ids))}, number) for number, ids in enumerate(token_ids)
        ]
        rewards = [0.0] * len(samples)
        for batch in cut(samples, CutPolicy(packed=self.model.packed, max_tokens=self.max_tokens)):
            on_device = batch.to(self.device)
            values = document_values(self.model(on_device), on_device).tolist()
            for (number, _), value in zip(batch.samples, values, strict=True):
                rewards[number] = value
        return rewards
