"""Compiled layers and replayed micro-batches on a GPU: the losses of the plain step."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fourfold.config.load import load
from fourfold.dataset.batch import IGNORE_INDEX, Example, Sample
from fourfold.dataset.collate import CutPolicy, cut, filler
from fourfold.losses.token import TokenLoss
from fourfold.models import document_attention
from fourfold.models.adapters import attach
from fourfold.models.equal_documents import equal_documents, has_kernel
from fourfold.models.load import load_model
from fourfold.models.low_rank import FrozenWeight
from fourfold.parallel.mesh import single
from fourfold.parallel.reduce import clip_gradients
from fourfold.training.build import build
from fourfold.training.fast import NOTHING_FAST, Fast
from fourfold.training.optimizers.adamw_torch import AdamW
from fourfold.training.precision import LossScaler, resolve
from tiny_models import tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),  # as an error, what torch's compiler warns of would end it
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MODELS = Path(__file__).parents[2] / "examples" / "models"
_STEPS = 20
_ALL_SEEN = 8
"""From this step on every shape has come twice: nothing is compiled or recorded any more."""
_POLICY = CutPolicy(packed=True, max_tokens=2048, multiple=16)


def samples_of(step: int) -> list[Sample]:
    """Eight samples of 20 to 150 tokens; every fourth step has the same lengths, so that shapes come back."""
    generator = torch.Generator().manual_seed(step)
    lengths = torch.randint(20, 150, (8,), generator=torch.Generator().manual_seed(step % 4)).tolist()
    found = []
    for index, length in enumerate(lengths):
        ids = torch.randint(3, 300, (length,), generator=generator).tolist()
        found.append(Sample({"": Example(ids, [IGNORE_INDEX] * (length // 3) + ids[length // 3 :])}, 8 * step + index))
    return found


def rows_of(step: int) -> list[Sample]:
    """Four full rows of 1,024 tokens, as a pretraining text is cut."""
    ids = torch.randint(3, 8192, (4, 1024), generator=torch.Generator().manual_seed(step)).tolist()
    return [Sample({"": Example(row, row)}, 4 * step + index) for index, row in enumerate(ids)]


@contextmanager
def nothing_waits() -> Iterator[None]:
    """Fails where the host would wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def curve(
    folder: Path,
    wishes: Fast,
    *,
    samples: Callable[[int], list[Sample]] = samples_of,
    lr: float = 1e-3,
    spared: int = 0,
    copies: bool = False,
    compiles: bool = True,
    **keys: object,
) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of some steps."""
    device = torch.device("cuda")
    torch._dynamo.reset()
    torch.manual_seed(0)
    run = load({"model_name_or_path": str(folder), "dataset": "d", "output_dir": "o", **keys}, verb="train")
    precision = resolve(run)
    is_half = run.training.bf16 or run.training.fp16
    model = load_model(run.model, dtype=precision.load, device=device)
    module = attach(model, run.model, run.tuning, trainable=True, master_dtype=precision.master)
    trained = [p for p in module.parameters() if p.requires_grad]
    if run.tuning.finetuning_type == "lora":
        generator = torch.Generator().manual_seed(1)
        for parameter in trained:  # so that both matrices of an adapter matter from the first step on
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    built = build(run, precision, single(device), module, wishes=wishes)
    if wishes.compiled or wishes.graphs:
        assert built.fast.compiled == (wishes.compiled and compiles)
        assert built.fast.graphs == (
            wishes.graphs and run.tuning.finetuning_type == "lora" and "moe" not in str(folder)
        )
    built.recompute("full" if run.parallel.recompute == "full" else "none", spared)
    scaler = LossScaler(device) if precision.loss_scaling else None
    step = built.step(TokenLoss(), partial(filler, _POLICY), scaler)
    optimizer = AdamW(trained, lr=lr, fused=True)
    if copies:
        assert built.keep_copies() > 0
    module.train()
    losses, norms = [], []
    for number in range(_STEPS):
        optimizer.zero_grad(set_to_none=step.graphs is None)
        built.noise.step = number
        batches = cut(samples(number), _POLICY)
        # experts in fp32 have no grouped product, and are gone through one by one
        with nothing_waits() if number >= _ALL_SEEN and is_half else nullcontext():
            running = step.begin(batches)
        result = running.read()
        if scaler is not None:
            scaler.unscale_(optimizer)
        norms.append(float(clip_gradients(trained, 1.0)))
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        losses.append(result.loss)
    assert built.model.compiled is None or not built.model.compiled.trains_plain  # it could be compiled
    return losses, norms


def small_model(family: str, folder: Path) -> Path:
    """A model on disk whose sizes the GPU's kernels take."""
    sizes: dict[str, float] = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "head_dim": 32}
    if family == "gpt_oss":  # larger weights have choices of experts flip in bf16, by which losses differ by 0.02
        sizes["initializer_range"] = 0.02
    tiny_model(family, **sizes, **({"moe_intermediate_size": 64} if family == "qwen3_moe" else {})).save_pretrained(
        folder
    )
    return folder


def apart(losses: list[float], expected: list[float]) -> float:
    """The mean difference of two curves."""
    return mean(abs(a - b) for a, b in zip(losses, expected, strict=True))


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with experts."""
    return small_model("qwen3_moe", tmp_path_factory.mktemp("qwen3_moe"))


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma3_text", "mistral"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model on disk."""
    return small_model(request.param, tmp_path_factory.mktemp(request.param))


_NOISE: dict[str, object] = {"bf16": True, "lora_dropout": 0.1, "neftune_noise_alpha": 5.0}


@pytest.mark.parametrize(
    "keys",
    [
        {"bf16": True},
        {"fp16": True},
        {"bf16": True, "quantization_bit": 4},
        _NOISE,
        {**_NOISE, "quantization_bit": 4},
    ],
)
def test_lora_when_fast_has_the_losses_of_the_plain_step(folder: Path, keys: dict[str, object]) -> None:
    exact = {key: value for key, value in keys.items() if key not in ("bf16", "fp16")}
    keys, exact = ({**each, "finetuning_type": "lora", "lora_rank": 8} for each in (keys, exact))
    expected, norms = curve(folder, NOTHING_FAST, **exact)
    plain, plain_norms = curve(folder, NOTHING_FAST, **keys)
    noise = mean(abs(a - b) for a, b in zip(expected, plain, strict=True))
    # over a packed base a norm of the plain step in bf16 may be 0.058 off (mistral, as a CPU computes it, too)
    noise_of_norms = max(abs(a / b - 1) for a, b in zip(plain_norms, norms, strict=True))
    for wishes in (Fast(compiled=True), Fast(graphs=True), Fast(compiled=True, graphs=True)):
        losses, found = curve(folder, wishes, **keys)
        differences = [a - b for a, b in zip(losses, expected, strict=True)]
        assert mean(map(abs, differences)) <= max(2e-3, 1.5 * noise), (wishes, differences, noise)
        assert abs(mean(differences[10:])) <= max(2e-3, 1.5 * noise)
        assert found == pytest.approx(norms, rel=max(0.05, 1.5 * noise_of_norms))


@pytest.mark.parametrize("keys", [{"bf16": True}, {"bf16": True, "quantization_bit": 4}])
def test_lora_when_memory_is_low_has_the_losses_of_the_plain_step_in_less(
    keys: dict[str, object], tmp_path: Path
) -> None:
    tiny_model("llama", hidden_size=128, intermediate_size=256, num_hidden_layers=3, vocab_size=65536).save_pretrained(
        tmp_path
    )
    lora = {"finetuning_type": "lora", "lora_rank": 8, **keys}
    expected, norms = curve(tmp_path, NOTHING_FAST, **lora)
    peaks: list[int] = []
    for wishes, memory in ((Fast(), "auto"), (Fast(), "low"), (Fast(compiled=True, graphs=True), "low")):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        losses, found = curve(tmp_path, wishes, **lora, memory=memory)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        assert mean(abs(a - b) for a, b in zip(losses, expected, strict=True)) <= 4e-3
        assert found == pytest.approx(norms, rel=0.1)
    table = 65536 * 128 * 2
    assert peaks[1] < peaks[0] - table
    assert peaks[2] < peaks[0] - table


@pytest.mark.parametrize(
    ("recompute", "spared", "copies"), [("none", 0, False), ("none", 0, True), ("full", 0, False), ("full", 1, True)]
)
def test_full_tuning_when_compiled_has_the_losses_of_the_plain_step(
    folder: Path, recompute: str, spared: int, copies: bool
) -> None:
    keys = {"finetuning_type": "full", "parallel": {"recompute": recompute}}
    expected, norms = curve(folder, NOTHING_FAST, **keys)
    plain, _ = curve(folder, NOTHING_FAST, **keys, bf16=True)
    losses, found = curve(folder, Fast(compiled=True, graphs=True), spared=spared, copies=copies, **keys, bf16=True)
    assert apart(losses, expected) <= max(2e-3, 1.5 * apart(plain, expected))
    assert found == pytest.approx(norms, rel=0.1)


@pytest.mark.parametrize(
    "keys",
    [
        {"finetuning_type": "full"},
        {"finetuning_type": "full", "parallel": {"recompute": "full"}},
        {"finetuning_type": "lora", "lora_target": "q_proj,v_proj"},
        {"finetuning_type": "lora"},  # on experts, too
        {"finetuning_type": "lora", "parallel": {"recompute": "full"}},
    ],
)
def test_experts_when_compiled_have_the_losses_of_the_plain_step(experts: Path, keys: dict[str, object]) -> None:
    expected, norms = curve(experts, NOTHING_FAST, **keys)
    plain, _ = curve(experts, NOTHING_FAST, **keys, bf16=True)
    losses, found = curve(experts, Fast(compiled=True), **keys, bf16=True)
    assert apart(losses, expected) <= max(2e-3, 1.5 * apart(plain, expected))  # a choice of experts may flip
    assert found == pytest.approx(norms, rel=0.1)


@pytest.mark.parametrize("kernels", [True, False])  # of our own; else torch's flash attention, which knows no caps
@pytest.mark.parametrize(
    "keys", [{"finetuning_type": "full"}, {"finetuning_type": "lora", "lora_target": "q_proj,v_proj"}]
)
@pytest.mark.parametrize("family", ["gpt_oss", "gemma2"])
def test_models_with_sinks_or_caps_when_compiled_have_the_losses_of_the_plain_step(
    family: str, keys: dict[str, object], kernels: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernels:
        monkeypatch.setattr(document_attention, "has_kernel", lambda device: False)
    elif not document_attention.has_kernel(torch.device("cuda")):
        pytest.skip("the kernels are for newer GPUs")
    folder = small_model(family, tmp_path)
    expected, norms = curve(folder, NOTHING_FAST, **keys)
    plain, plain_norms = curve(folder, NOTHING_FAST, **keys, bf16=True)
    # a choice of experts may flip, and norms of gpt-oss in bf16 are up to a tenth off those in fp32
    noise = max(abs(a / b - 1) for a, b in zip(plain_norms, norms, strict=True))
    compiled = kernels or family == "gpt_oss"
    losses, found = curve(folder, Fast(compiled=True), compiles=compiled, **keys, bf16=True)
    assert apart(losses, expected) <= max(2e-3, 1.5 * apart(plain, expected))
    assert found == pytest.approx(norms, rel=max(0.1, 1.5 * noise))


@pytest.mark.parametrize(("family", "compiled"), [("gpt_oss", False), ("gpt_oss", True), ("gemma2", True)])
def test_attention_with_sinks_or_caps_never_holds_its_scores(family: str, compiled: bool, tmp_path: Path) -> None:
    if family == "gemma2" and not document_attention.has_kernel(torch.device("cuda")):
        pytest.skip("the kernel of soft caps is for newer GPUs")
    folder, ids = small_model(family, tmp_path), torch.randint(3, 300, (8192,)).tolist()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    rows = lambda step: [Sample({"": Example(ids, ids)}, step)]  # noqa: E731
    keys = {"finetuning_type": "lora", "lora_target": "q_proj", "bf16": True}
    curve(folder, Fast(compiled=True) if compiled else NOTHING_FAST, samples=rows, **keys)
    scores = 4 * 8192 * 8192 * 2  # of one layer's heads
    assert torch.cuda.max_memory_allocated() - before < scores


_FULL: dict[str, object] = {"finetuning_type": "full", "lr": 1e-5, "samples": rows_of}
_LORA: dict[str, object] = {"finetuning_type": "lora", "lora_rank": 8, "lr": 1e-4}


@pytest.mark.parametrize(
    ("name", "keys", "fast", "tolerance"),
    [
        ("Llama-3-8B", _LORA, {}, 2e-3),
        ("Llama-3-8B", {**_LORA, "samples": rows_of}, {}, 2e-3),
        ("Llama-3-8B", _LORA, {"memory": "low"}, 2e-3),
        ("Llama-3.2-3B", _FULL, {}, 2e-3),
        ("Llama-3.2-3B", _FULL, {"copies": True}, 2e-3),
        ("Llama-3.2-3B", _FULL, {"parallel": {"recompute": "full"}}, 2e-3),
        ("Llama-3.2-3B", _FULL, {"fp8": True}, 2e-2),
        ("Qwen3-30B-A3B", _FULL, {}, 2e-3),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else str(value),
)
def test_workload_when_fast_has_the_losses_of_the_plain_step_in_fp32(
    name: str, keys: dict[str, Any], fast: dict[str, object], tolerance: float, tmp_path: Path
) -> None:
    if fast.get("fp8") and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU with float8")
    config = json.loads((MODELS / name / "config.json").read_text(encoding="utf-8"))
    small = {"num_hidden_layers": 2, "vocab_size": 8192, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    (tmp_path / "config.json").write_text(json.dumps(config | small), encoding="utf-8")
    keys = {**keys, "train_from_scratch": True}
    expected, norms = curve(tmp_path, NOTHING_FAST, **keys)
    losses, found = curve(tmp_path, Fast(compiled=True, graphs=True), **keys, **fast, bf16=True)
    assert apart(losses, expected) <= tolerance
    assert abs(mean(losses[10:]) - mean(expected[10:])) <= tolerance  # no drift
    assert found == pytest.approx(norms, rel=0.1 if fast.get("fp8") else 0.03)


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(32, 8, 128), (24, 8, 128), (32, 4, 128), (9, 3, 64)])
def test_attention_of_equal_documents_gives_what_they_give_in_fp32(heads: int, kv_heads: int, width: int) -> None:
    if not has_kernel(torch.device("cuda")):
        pytest.skip("needs a GPU on which cuDNN's kernel is the faster one")
    torch.manual_seed(0)
    shapes = [(1, 2048, count, width) for count in (heads, kv_heads, kv_heads, heads)]
    query, key, value, grad = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)
    results = []
    for exact in (False, True):
        dtype = torch.float32 if exact else torch.bfloat16
        inputs = [tensor.to(dtype).transpose(1, 2).requires_grad_() for tensor in (query, key, value)]
        if exact:
            parts = (tensor[0].unflatten(1, (2, 1024)).transpose(0, 1) for tensor in inputs)
            made = F.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)
            out = made.transpose(1, 2).flatten(0, 1)[None]
        else:
            out = equal_documents(*inputs, 2, None)
        out.backward(grad.to(dtype))
        results.append([out.detach(), *(tensor.grad for tensor in inputs)])
    for found, expected in zip(*results, strict=True):
        assert found is not None
        assert expected is not None
        assert float((found.float() - expected).abs().max()) <= 1e-2 * float(expected.abs().max())


@pytest.mark.parametrize("double", [True, False])
def test_unpacking_when_compared_with_bitsandbytes_gives_the_same_numbers(double: bool) -> None:
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    from fourfold.parallel.unpack_kernel import unpack_nf4

    torch.manual_seed(0)
    layer = Linear4bit(
        1088, 352, bias=False, compute_dtype=torch.bfloat16, compress_statistics=double, quant_type="nf4"
    )
    layer.load_state_dict(torch.nn.Linear(1088, 352, bias=False).state_dict())
    layer = layer.to("cuda")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        state = layer.weight.quant_state
        state.dtype = dtype
        packed = FrozenWeight.packed([layer])
        found = torch.empty(352, 1088, dtype=dtype, device="cuda")
        unpack_nf4(packed.tensors, packed.sizes, found)
        expected = dequantize_4bit(layer.weight.data, state)
        if dtype == torch.float32:  # product and sum are one rounding in one of the two
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
        else:
            assert torch.equal(found, expected)
