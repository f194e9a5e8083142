"""Experts of one rank give what Transformers' own loop over experts gives, and nothing is added into zeros."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fourfold.models.patches import peft_noise_ignored
from fourfold.parallel.expert_rows import count_choices, sort_choices
from fourfold.parallel.local_experts import use_local_experts
from fourfold.parallel.stacked_experts import find_experts
from fourfold.training.precision import cast_experts
from tiny_models import MOE_FAMILIES, tiny_model

_TOKENS, _EXPERTS = 7, 4


def pair(family: str, dtype: torch.dtype, **config: Any) -> tuple[Any, Any]:
    """The same experts as Transformers' loop and as experts of one rank."""
    model = tiny_model(family, **config).to(dtype)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    model.set_experts_implementation("grouped_mm")
    loop = next(find_experts(model))[1]
    ours = copy.deepcopy(loop)
    loop.config = copy.deepcopy(loop.config)
    loop.config._experts_implementation = "eager"
    assert use_local_experts(ours) == 1
    return loop, ours


def results(experts: Any, choices: int, dtype: torch.dtype, run: Callable[..., Any] | None = None) -> list[Tensor]:
    """Output and gradients of tokens, weights and parameters; nobody chooses the last expert."""
    experts.zero_grad()
    generator = torch.Generator().manual_seed(choices)
    tokens = torch.randn(_TOKENS, 32, generator=generator).to(dtype).requires_grad_()
    indices = torch.rand(_TOKENS, _EXPERTS - 1, generator=generator).topk(choices).indices
    weights = torch.rand(_TOKENS, choices, generator=generator).to(dtype).requires_grad_()
    output = (experts if run is None else run)(tokens, indices, weights)
    (output * torch.randn(_TOKENS, 32, generator=generator).to(dtype)).sum().backward()
    assert tokens.grad is not None
    assert weights.grad is not None
    return [output.detach(), tokens.grad, weights.grad, *(p.grad for p in experts.parameters())]


def largest_difference(expected: list[Tensor], found: list[Tensor]) -> float:
    """Over all tensors, relative to the largest number of each."""
    pairs = zip(expected, found, strict=True)
    return max(float((one.double() - other.double()).abs().max() / one.double().abs().max()) for one, other in pairs)


@pytest.mark.parametrize("family", MOE_FAMILIES)
@pytest.mark.parametrize("choices", [1, 2, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_local_experts_when_compared_with_a_loop_give_the_same_outputs_and_gradients(
    family: str, choices: int, dtype: torch.dtype, tolerance: float
) -> None:
    loop, ours = pair(family, dtype)
    assert largest_difference(results(loop, choices, dtype), results(ours, choices, dtype)) <= tolerance


@pytest.mark.filterwarnings("default")  # as an error, what torch's compiler warns of would end it
@pytest.mark.parametrize("family", MOE_FAMILIES)
@pytest.mark.parametrize("choices", [1, 3])
def test_local_experts_when_compiled_for_all_lengths_give_the_same(family: str, choices: int) -> None:
    loop, ours = pair(family, torch.bfloat16)
    torch._dynamo.reset()
    run = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
    found = results(ours, choices, torch.bfloat16, run)
    assert largest_difference(results(loop, choices, torch.bfloat16), found) <= 0.02  # bf16 has 8 bits


def test_local_experts_when_masters_and_weights_are_wider_give_the_same_under_autocast() -> None:
    loop, ours = pair("qwen3_moe", torch.float32)
    cast_experts(ours, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):  # tokens and weights in fp32, rows in bf16
        found = results(ours, 3, torch.float32)
    assert all(tensor.dtype == torch.float32 for tensor in found)
    assert largest_difference(results(loop, 3, torch.float32), found) <= 0.02


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("compiled", [False, True])
def test_local_experts_when_weights_have_no_gradient_give_that_of_tokens(compiled: bool) -> None:
    loop, ours = pair("qwen3_moe", torch.bfloat16)
    torch._dynamo.reset()
    run = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager") if compiled else ours
    tokens = torch.randn(_TOKENS, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    indices = torch.tensor([[0, 1], [2, 1], [0, 3], [3, 2], [1, 3], [2, 0], [1, 2]])
    weights = torch.full((_TOKENS, 2), 0.5, dtype=torch.bfloat16)
    found = []
    for experts in (loop, run):
        given = tokens.clone().requires_grad_()
        experts(given, indices, weights).square().sum().backward()
        assert given.grad is not None
        found.append([given.grad])
    assert largest_difference(*found) <= 0.02


def test_sort_choices_gives_rows_by_expert_and_the_way_back() -> None:
    chosen, order, inverse = sort_choices(torch.tensor([[3, 0], [0, 1], [3, 1]]))
    assert chosen.tolist() == [0, 0, 1, 1, 3, 3]
    assert order.tolist() == [1, 2, 3, 5, 0, 4]  # choices of one expert stay in the order of tokens
    assert inverse.tolist() == [[4, 0], [1, 2], [5, 3]]


def test_count_choices_when_a_number_is_beyond_the_experts_leaves_it_out() -> None:
    assert count_choices(torch.tensor([[0, 2], [2, 3], [3, 1]]), 3).tolist() == [1, 1, 2]


class _Named(TorchDispatchMode):
    """Notes the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name().split(".")[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_local_experts_when_gradients_are_made_add_nothing_into_zeros(family: str) -> None:
    _, ours = pair(family, torch.float32)
    with _Named() as ran:
        results(ours, 2, torch.float32)
    assert "aten::index" in ran.names
    assert not [name for name in ran.names if "index_put" in name or "index_add" in name or "scatter_add" in name]


def test_local_experts_when_run_keep_what_the_planner_counts() -> None:
    """Bytes of one token more, as in planning/activations.py."""
    hidden, width, choices = 32, 16, 2
    model = tiny_model("qwen3_moe").to(torch.bfloat16)
    use_local_experts(model)
    mlp = model.model.layers[0].mlp
    rows = 2 * (2 * hidden + 4 * width) + 8 + 8 + 2  # sorted tokens, gate and up, ...; order, its inverse, weight
    router = 8 + 4  # the number of the expert, its probability
    expected = 2 * hidden + choices * (rows + router) + 4 * _EXPERTS + 4
    assert _kept(mlp, 128) - _kept(mlp, 64) == 64 * expected


def _kept(mlp: nn.Module, tokens: int) -> int:
    own = {parameter.untyped_storage().data_ptr() for parameter in mlp.parameters()}
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        mlp(torch.randn(1, tokens, 32, dtype=torch.bfloat16, requires_grad=True))
    return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in own)


def test_local_experts_when_they_have_adapters_give_what_transformers_gives() -> None:
    found = []
    for local in (False, True):
        torch.manual_seed(0)
        targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        config = LoraConfig(r=4, target_modules=[], target_parameters=targets, init_lora_weights=False)
        with peft_noise_ignored():
            model = get_peft_model(tiny_model("qwen3_moe"), config)
        assert not local or use_local_experts(model) == 2
        output = model(input_ids=torch.arange(9)[None]).logits
        output.square().sum().backward()
        found.append([output.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == 1 + 2 * 2 * 2
    assert largest_difference(*found) <= 1e-5


def test_local_experts_when_another_implementation_is_set_leave_it_to_transformers() -> None:
    loop, ours = pair("qwen3_moe", torch.float32)
    ours.config._experts_implementation = "eager"
    with _Named() as ran:
        found = results(ours, 2, torch.float32)
    assert "aten::_grouped_mm" not in ran.names
    assert largest_difference(results(loop, 2, torch.float32), found) == 0


@pytest.mark.parametrize("change", ["forward", "norm", "parallel", "packed", "more"])
def test_local_experts_when_something_is_not_known_are_left_as_they_are(change: str) -> None:
    experts: Any = next(find_experts(tiny_model("qwen3_moe")))[1]
    if change == "forward":
        experts.forward = lambda *_: None
    elif change == "norm":
        experts.has_post_expert_norm = True
    elif change == "parallel":
        experts._is_expert_parallel = True
    elif change == "packed":
        experts.down_proj = nn.Parameter(experts.down_proj.to(torch.int8), requires_grad=False)
    else:
        experts.scale = nn.Parameter(torch.ones(1))
    before = type(experts)
    assert use_local_experts(experts) == 0
    assert type(experts) is before
