"""How far two models' outputs lie apart, on a few fixed prompts.

Shape legend: P positions of all prompts together, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

_PROMPTS = (
    "Who are you, and who made you?",
    "The capital of France is Paris. The capital of Japan is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "1 + 1 = 2, 2 + 2 = 4, 12 + 30 = ",
)


@dataclass(frozen=True, slots=True)
class Comparison:
    """The difference between a model and what it should be.

    Attributes:
        largest: largest absolute difference of a logit.
        scale: largest absolute logit, to see whether `largest` is much.
        agreeing: positions at which both find the same token most likely.
        positions: how many were compared.
    """

    largest: float
    scale: float
    agreeing: int
    positions: int

    def __str__(self) -> str:
        return (
            f"largest logit difference {self.largest:.3g} (of logits up to {self.scale:.3g}), "
            f"same most likely token at {self.agreeing} of {self.positions} positions"
        )


def fixed_prompts(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of the prompts that are compared; plain text, so that they need no template."""
    return [tokenizer.encode(prompt, add_special_tokens=False) for prompt in _PROMPTS]


@torch.no_grad()
def logits_of(model: nn.Module, prompts: list[list[int]], device: torch.device) -> Tensor:
    """Logits at every position of every prompt, [P, V] fp32 on the CPU.

    One prompt at a time, without padding: the result must not depend on how a model treats padding.
    """
    rows = [model(input_ids=torch.tensor([prompt], device=device), use_cache=False).logits[0] for prompt in prompts]
    return torch.cat([row.float().cpu() for row in rows])


def compare(expected: Tensor, found: Tensor) -> Comparison:
    """Compare logits of two models, both [P, V]; what one has beyond the other's vocabulary is left out."""
    shared = min(expected.shape[1], found.shape[1])
    expected, found = expected[:, :shared], found[:, :shared]
    return Comparison(
        largest=float((expected - found).abs().max()),
        scale=float(expected.abs().max()),
        agreeing=int((expected.argmax(1) == found.argmax(1)).sum()),
        positions=expected.shape[0],
    )
