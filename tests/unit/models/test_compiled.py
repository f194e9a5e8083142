"""Compiled layers and losses give what they give as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch._inductor.config
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from fourfold.models import compiled
from fourfold.models.adapters import without_adapters
from fourfold.models.compiled import (
    CompiledForward,
    compile_layers,
    join_small_kernels,
    recompute_compiled,
)
from fourfold.models.lora import join_siblings, use_short_forward
from fourfold.models.noise import NoiseKeys, hash32, key_dropout
from fourfold.models.targets import decoder_blocks, final_norms
from fourfold.parallel.expert_load import ExpertLoad
from fourfold.parallel.local_experts import use_local_experts
from fourfold.parallel.stacked_experts import experts_and_adapters, find_experts
from fourfold.training.precision import cast_experts
from tiny_models import FAMILIES, tiny_model

pytestmark = pytest.mark.filterwarnings("default")  # as an error, what torch's compiler warns of would end it

_SIZE = 16


class _Layer(nn.Module):
    """A norm, a gated product and a residual, as decoder layers have them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(_SIZE, _SIZE, bias=False), nn.Linear(_SIZE, _SIZE, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(x, (_SIZE,))
        return x + F.silu(self.gate_proj(normed)) * self.up_proj(normed)


class _Model(nn.Module):
    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer() for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def adapted(rank: int = 4, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(r=rank, target_modules=["gate_proj", "up_proj"], **settings)
    model = get_peft_model(_Model(), config)  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    assert use_short_forward(model) == 6
    return model


def gradients(model: nn.Module, tokens: int) -> list[Tensor]:
    """Output and gradients for an input of so many tokens."""
    model.zero_grad()
    x = torch.randn(1, tokens, _SIZE, generator=torch.Generator().manual_seed(tokens))
    out = model(x)
    out.square().sum().backward()
    return [out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_layers_when_lengths_differ_give_what_plain_ones_give(joined: bool, recompute: bool) -> None:
    plain, fast = adapted(), adapted()
    assert not joined or join_siblings(fast) == 3
    layers = [module for module in fast.modules() if isinstance(module, _Layer)]
    torch._dynamo.reset()
    compile_layers(layers, backend="aot_eager")
    if recompute:
        recompute_compiled(layers)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for tokens in (5, 12, 31):
        expected, found = gradients(plain, tokens), gradients(fast, tokens)
        assert len(found) == 13
        for one, other in zip(expected, found, strict=True):
            assert float((one - other).abs().max()) <= 1e-5 * float(one.abs().max())
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
    assert graphs == 2  # the first layer, whose input has no gradient, and the others


@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_layers_when_inputs_of_adapters_are_dropped_share_what_is_compiled(recompute: bool) -> None:
    found: list[list[list[Tensor]]] = []
    for fast in (False, True):
        model, keys = adapted(lora_dropout=0.3), NoiseKeys(seed=0)
        assert key_dropout(model, keys) == 6
        layers = [module for module in model.modules() if isinstance(module, _Layer)]
        before = 0
        if fast:
            torch._dynamo.reset()
            assert join_siblings(model) == 3
            compile_layers(layers, backend="aot_eager")
            if recompute:
                recompute_compiled(layers)
            before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        model.train()
        passes: list[list[Tensor]] = []
        for tokens in (5, 12, 31):
            keys.tokens = hash32(torch.arange(tokens, dtype=torch.int32)[None] + tokens)
            passes.append(gradients(model, tokens))
        found.append(passes)
        if fast:
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 2
    for expected, passes in zip(*found, strict=True):
        for one, other in zip(expected, passes, strict=True):
            assert float((one - other).abs().max()) <= 1e-5 * float(one.abs().max())
    assert not torch.allclose(found[0][0][1], found[0][1][1])


def _products(operator: Any, graphs: list[int]) -> Callable[..., Any]:
    """A backend that runs graphs as they are, and notes how many calls of an operator each has."""
    from functorch.compile import nop
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    def note(graph: Any, inputs: Any) -> Any:
        graphs.append(sum(node.target is operator for node in graph.graph.nodes))
        return nop(graph, inputs)

    return aot_autograd(fw_compiler=note, bw_compiler=note, partition_fn=min_cut_rematerialization_partition)


def _kept(layers: Sequence[nn.Module], x: Tensor) -> int:
    """Numbers that a pass through layers keeps, but for weights."""
    held: dict[int, int] = {}
    owned = {parameter.untyped_storage().data_ptr() for layer in layers for parameter in layer.parameters()}

    def pack(found: Tensor) -> Tensor:
        if found.untyped_storage().data_ptr() not in owned:
            held[found.untyped_storage().data_ptr()] = found.numel()
        return found

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda found: found):
        for layer in layers:
            x = layer(x)
    return sum(held.values())


class _Mlp(nn.Sequential):
    def __init__(self) -> None:
        into, out_of = nn.Linear(_SIZE, 4 * _SIZE, bias=False), nn.Linear(4 * _SIZE, _SIZE, bias=False)
        super().__init__(into, nn.SiLU(), out_of)


@pytest.mark.parametrize("has_adapters", [False, True])
def test_compiled_layers_when_computed_again_keep_their_inputs_and_leave_out_the_last_product(
    has_adapters: bool,
) -> None:
    model: nn.Module = nn.Sequential(*(_Mlp() for _ in range(3)))
    operator = torch.ops.aten.mm.default
    # forward and backward of the first layer, whose input has no gradient, and of the others
    expected, again = [2, 3, 2, 4], [2, 4, 2, 5]
    if has_adapters:
        model = get_peft_model(model, LoraConfig(target_modules=r"\d\.[02]"))  # type: ignore[arg-type]
        assert use_short_forward(model) == 6
        operator, expected, again = torch.ops.fourfold.low_rank.default, [2, 0, 2, 0], [2, 1, 2, 1]
    layers = [module for module in model.modules() if isinstance(module, _Mlp)]
    x = torch.randn(5, _SIZE)
    graphs: list[int] = []
    torch._dynamo.reset()
    compile_layers(layers, backend=_products(operator, graphs))
    assert _kept(layers, x) > 3 * x.numel()
    assert graphs == expected
    graphs.clear()
    recompute_compiled(layers)
    assert _kept(layers, x) == 3 * x.numel()
    assert graphs == again


def test_compiled_layers_when_only_asked_run_as_they_are() -> None:
    model = adapted()
    layers = [module for module in model.modules() if isinstance(module, _Layer)]
    compile_layers(layers, backend=_refuse)
    with torch.no_grad():
        model(torch.randn(1, 3, _SIZE))
    model.eval()
    model(torch.randn(1, 3, _SIZE))


def test_compiled_layers_when_a_step_asks_are_compiled_with_and_without_adapters() -> None:
    plain, fast = adapted().eval(), adapted().eval()
    torch._dynamo.reset()
    shared = compile_layers([module for module in fast.modules() if isinstance(module, _Layer)], backend="aot_eager")
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for tokens in (5, 12, 31):
        x = torch.randn(1, tokens, _SIZE, generator=torch.Generator().manual_seed(tokens))
        with torch.no_grad(), shared.asked():
            assert torch.allclose(fast(x), plain(x), atol=1e-6)
            with without_adapters(fast), without_adapters(plain):  # type: ignore[arg-type]
                base = plain(x)
                assert torch.allclose(fast(x), base, atol=1e-6)
        assert not torch.allclose(plain(x), base, atol=1e-3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 2
    assert not shared.is_asked


def test_compiled_layers_when_what_is_asked_cannot_be_compiled_are_trained_compiled_all_the_same(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def no_inference(graph: Any, inputs: Any) -> Any:
        if not torch.is_grad_enabled():
            raise RuntimeError("nothing is compiled here")
        return graph

    plain, fast = adapted(), adapted()
    torch._dynamo.reset()
    shared = compile_layers([module for module in fast.modules() if isinstance(module, _Layer)], backend=no_inference)
    compiled.log.propagate = True
    x = torch.randn(1, 4, _SIZE)
    with torch.no_grad(), shared.asked():
        assert torch.equal(fast(x), plain(x))
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for one, other in zip(gradients(plain, 4), gradients(fast, 4), strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 2
    assert len([message for message in caplog.messages if "where they have no gradients" in message]) == 1


def _experts_of(model: PreTrainedModel, recompute: bool, compiled: bool) -> tuple[list[Tensor], dict[str, float]]:
    """Results, gradients and loads of the MLPs of a model, for three lengths."""
    load = ExpertLoad(model)
    blocks = [layer.mlp for layer in decoder_blocks(model)[1]]
    if compiled:
        compile_layers(blocks, backend="aot_eager")
        if recompute:
            recompute_compiled(blocks)
    model.train()
    found: list[Tensor] = []
    for tokens in (9, 20, 31):
        x = torch.randn(1, tokens, model.config.hidden_size, generator=torch.Generator().manual_seed(tokens))
        counted = torch.arange(tokens)[None] < tokens - 2
        with torch.autocast("cpu", torch.bfloat16), load.watch(counted):
            for block in blocks:
                x = x + block(x)  # type: ignore[operator]
        x.square().sum().backward()
        found.append(x.detach())
    return [*found, *(p.grad for p in model.parameters() if p.grad is not None)], load.figures()()


@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_layers_when_they_have_experts_share_two_graphs_and_are_counted(recompute: bool) -> None:
    models = [tiny_model("qwen3_moe", num_hidden_layers=4) for _ in range(2)]
    for model in models:
        cast_experts(model, torch.bfloat16)
    expected, loads = _experts_of(models[0], recompute, compiled=False)
    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    found, other_loads = _experts_of(models[1], recompute, compiled=True)
    assert len(found) == 3 + 4 * 3  # a router and two stacked matrices in each layer
    for one, other in zip(expected, found, strict=True):
        assert float((one - other).abs().max()) <= 1e-2 * float(one.abs().max())
    assert loads == other_loads
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
    assert graphs == 2


def _refuse(*_: object) -> object:
    raise RuntimeError("nothing is compiled here")


def test_compiled_layers_when_they_cannot_be_compiled_warn_once_and_run(caplog: pytest.LogCaptureFixture) -> None:
    plain, model = adapted(), adapted()
    torch._dynamo.reset()
    layers = [module for module in model.modules() if isinstance(module, _Layer)]
    compile_layers(layers, backend=_refuse)
    compiled.log.propagate = True
    for tokens in (4, 6):
        for one, other in zip(gradients(plain, tokens), gradients(model, tokens), strict=True):
            assert torch.equal(one, other)
    assert len([message for message in caplog.messages if message.startswith("torch_compile:")]) == 1
    assert all(isinstance(layer.forward, CompiledForward) for layer in layers)


def test_compiled_layers_when_only_the_backward_pass_cannot_be_compiled_run(caplog: pytest.LogCaptureFixture) -> None:
    from functorch.compile import nop
    from torch._dynamo.backends.common import aot_autograd

    plain, model = adapted(), adapted()
    torch._dynamo.reset()
    layers = [module for module in model.modules() if isinstance(module, _Layer)]
    compile_layers(layers, backend=aot_autograd(fw_compiler=nop, bw_compiler=_refuse))
    compiled.log.propagate = True
    for one, other in zip(gradients(plain, 4), gradients(model, 4), strict=True):
        assert torch.equal(one, other)
    assert [message for message in caplog.messages if "are not compiled" in message]


def test_compiled_layers_when_the_adapters_are_dora_run_and_say_so_if_they_are_not_compiled(
    caplog: pytest.LogCaptureFixture,
) -> None:
    plain, model = adapted(use_dora=True), adapted(use_dora=True)
    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compile_layers([module for module in model.modules() if isinstance(module, _Layer)], backend="aot_eager")
    compiled.log.propagate = True
    for tokens in (4, 6):
        for one, other in zip(gradients(plain, tokens), gradients(model, tokens), strict=True):
            assert torch.equal(one, other)
    told = [message for message in caplog.messages if "are not compiled" in message]
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
    assert bool(told) != bool(graphs)  # PEFT's variants can be compiled with some versions of torch, not with others


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_norms_that_are_compiled_beside_the_layers_are_those_behind_the_last_one(family: str) -> None:
    model = tiny_model(family)
    found = final_norms(model)
    assert len(found) == 1
    assert found[0] is model.get_decoder().norm
    assert not any(found[0] is module for layer in decoder_blocks(model)[1] for module in layer.modules())


@pytest.mark.parametrize("joins", [True, False])
def test_small_kernels_when_told_are_joined_or_not(joins: bool) -> None:
    config: Any = torch._inductor.config
    with config.patch(combo_kernels=not joins):
        join_small_kernels(joins=joins)
        assert config.combo_kernels == joins


@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_layers_when_experts_are_left_out_run_them_as_they_are(recompute: bool) -> None:
    """Hooks run, what they do need not be known to the compiler, and all layers share what was compiled."""
    plain, fast = (tiny_model("qwen3_moe", num_hidden_layers=5).train() for _ in range(2))
    for model in (plain, fast):
        use_local_experts(model)
    blocks: list[nn.Module] = list(decoder_blocks(fast)[1])
    torch._dynamo.reset()
    compile_layers(blocks, around=experts_and_adapters(fast), backend="aot_eager")
    if recompute:
        recompute_compiled(blocks)
    hosts: list[int] = []
    for _, experts in find_experts(fast):
        # a number on the host, as that of rows that come from other ranks
        experts.register_forward_pre_hook(lambda _, args: hosts.append(int(args[1].sum())))
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for tokens in (9, 20, 14):
        ids = torch.randint(3, 60, (1, tokens), generator=torch.Generator().manual_seed(tokens))
        for model in (plain, fast):
            model.zero_grad()
            model(input_ids=ids, use_cache=False).logits.square().mean().backward()
        pairs = zip(plain.parameters(), fast.parameters(), strict=True)
        assert all(torch.equal(one.grad, other.grad) for one, other in pairs if one.grad is not None)  # type: ignore[arg-type]
    assert len(hosts) == 3 * 5 * (2 if recompute else 1)
    # what comes before and after the experts in a layer and in the block that has them, and the gate
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 5


def test_compiled_layers_when_too_many_variants_are_asked_for_run_as_they_are() -> None:
    from torch._dynamo.exc import FailOnRecompileLimitHit

    def refuse(*_: Any) -> Any:
        raise FailOnRecompileLimitHit("too many")

    model = adapted()
    torch._dynamo.reset()
    layers = [module for module in model.modules() if isinstance(module, _Layer)]
    shared = compile_layers(layers, backend="aot_eager")
    for layer in layers:
        assert isinstance(layer.forward, CompiledForward)
        layer.forward._compiled = refuse
    expected = gradients(adapted(), 7)
    for one, other in zip(expected, gradients(model, 7), strict=True):
        assert torch.equal(one, other)
    assert shared.trains_plain
