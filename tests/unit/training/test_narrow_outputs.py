"""What flows between layers in mixed precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fourfold.models.targets import decoder_blocks
from fourfold.training.precision import narrow_outputs
from tiny_models import tiny_model


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_narrow_outputs_when_masters_are_wide_keeps_hidden_states_narrow(family: str) -> None:
    model, seen = tiny_model(family), []
    narrow_outputs(model, torch.bfloat16)

    def note(block: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0].dtype)

    for block in decoder_blocks(model)[1]:
        block.register_forward_pre_hook(note)
    ids = torch.arange(8)[None]
    with torch.autocast("cpu", torch.bfloat16):
        narrow = model(input_ids=ids).logits.detach()
    assert seen == [torch.bfloat16] * len(seen) != []
    wide = model(input_ids=ids).logits.detach()  # without autocast nothing is narrowed
    assert wide.dtype == seen[-1] == torch.float32
    assert float((narrow - wide).abs().max()) < 0.05 * float(wide.abs().max())
