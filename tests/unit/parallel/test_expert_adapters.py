"""LoRA of stacked experts as terms of rows gives what PEFT's sum of matrices gives, and makes nothing as large."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fourfold.models.compiled import compile_layers
from fourfold.models.patches import peft_noise_ignored
from fourfold.models.targets import decoder_blocks
from fourfold.models.unwrap import base_model
from fourfold.parallel.expert_adapters import use_row_adapters
from fourfold.parallel.local_experts import use_local_experts
from fourfold.parallel.stacked_experts import find_experts
from tiny_models import MOE_FAMILIES, tiny_model


def adapted(family: str, rank: int = 4) -> PeftModel:
    """A model with adapters on its experts, none of whose numbers are zero."""
    model = tiny_model(family)
    model.set_experts_implementation("grouped_mm")
    name, experts = next(find_experts(model))
    parameters = [n for n, p in experts.named_parameters() if p.ndim == 3]
    suffix = name.split(".", 3)[-1]
    config = LoraConfig(r=rank, target_modules=["o_proj"], target_parameters=[f"{suffix}.{n}" for n in parameters])
    with peft_noise_ignored():
        found = get_peft_model(model, config)
    for key, parameter in found.named_parameters():
        if "lora_" in key:
            parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(key)))
    return found  # type: ignore[return-value]


def results(model: PeftModel) -> dict[str, Tensor]:
    """Logits and gradients."""
    ids = torch.randint(3, 60, (2, 11), generator=torch.Generator().manual_seed(1))
    logits = model(input_ids=ids).logits
    logits.square().mean().backward()
    return {"logits": logits.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("family", MOE_FAMILIES)
@pytest.mark.parametrize("rank", [3, 8])
def test_row_adapters_when_compared_with_pefts_give_the_same(family: str, rank: int) -> None:
    plain = adapted(family, rank)
    ours = copy.deepcopy(plain)
    use_local_experts(ours)
    assert use_row_adapters(ours) >= 2
    expected, found = results(plain), results(ours)
    assert found.keys() == expected.keys()
    assert sum("experts" in name for name in found) >= 4
    for name, one in expected.items():
        torch.testing.assert_close(found[name], one, rtol=1e-4, atol=1e-5 * float(one.abs().max()), msg=name)


def test_row_adapters_when_they_are_off_or_merged_leave_it_to_peft() -> None:
    plain = adapted("qwen3_moe")
    ours = copy.deepcopy(plain)
    use_local_experts(ours)
    use_row_adapters(ours)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        with plain.disable_adapter(), ours.disable_adapter():
            torch.testing.assert_close(ours(input_ids=ids).logits, plain(input_ids=ids).logits)
        for model in (plain, ours):
            model.merge_adapter()
        torch.testing.assert_close(ours(input_ids=ids).logits, plain(input_ids=ids).logits)


class _Largest(TorchDispatchMode):
    """Notes how many numbers the largest new tensor of an operator has."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor) and not func.is_view and found.ndim == 3 and found._base is None:
            self.largest = max(self.largest, found.numel())
        return found


def test_row_adapters_make_nothing_of_the_experts_size() -> None:
    plain = adapted("qwen3_moe")
    ours = copy.deepcopy(plain)
    use_local_experts(ours)
    use_row_adapters(ours)
    size = max(p.numel() for _, experts in find_experts(ours) for p in experts.parameters())
    ids = torch.tensor([[5, 6]])
    for model, is_made in ((plain, True), (ours, False)):
        with _Largest() as seen:
            model(input_ids=ids).logits.sum().backward()
        assert (seen.largest >= size) == is_made


@pytest.mark.filterwarnings("default")  # as an error, what torch's compiler warns of would end it
def test_row_adapters_when_layers_are_compiled_whole_give_the_same() -> None:
    plain = adapted("qwen3_moe").bfloat16()
    fast = copy.deepcopy(plain)
    for model in (plain, fast):
        use_local_experts(model)
        use_row_adapters(model)
        model.train()
    torch._dynamo.reset()
    shared = compile_layers(list(decoder_blocks(base_model(fast))[1]), backend="aot_eager")
    expected, found = results(plain), results(fast)
    assert not shared.trains_plain
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        assert float((found[name] - one).abs().max()) <= 0.03 * float(one.abs().max())  # bf16 has 8 bits
