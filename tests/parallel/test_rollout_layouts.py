"""Answers are the same under every layout as Transformers' own, and a model is trained on as if it had not answered."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from harness import Case, Curve, alone, assert_together_same, make_model, run_ranks, train
from transformers import GenerationConfig, PreTrainedModel

from fourfold.config.model import ModelConfig
from fourfold.generate.interface import Sampling
from fourfold.generate.rollout import Completion, RolloutEngine
from fourfold.models.forward import StepModel
from fourfold.models.load import load_model
from fourfold.models.targets import decoder_blocks
from fourfold.models.tokenizer import load_tokenizer
from fourfold.models.unwrap import TunedModel, base_model
from fourfold.parallel.apply import Parallelized, parallelize
from fourfold.parallel.mesh import Mesh, build_mesh, single
from fourfold.planning.layout import Layout

_CPU = torch.device("cpu")
_STOP = tuple(range(1, 24))
_GREEDY = Sampling(do_sample=False, max_new_tokens=10)
_SAMPLED = Sampling(temperature=1.3, top_k=40, top_p=0.9, repetition_penalty=1.2, max_new_tokens=5, seed=3)
_IN_BLOCKS = (("hidden_size", 128), ("head_dim", 64), ("intermediate_size", 256))
"""Columns of a 4-bit weight are cut in blocks of 64."""

CASES = {
    "llama-lora": Case(tuning="lora", dropout=0.5),
    "qwen3": Case("qwen3"),
    "gemma3": Case("gemma3_text"),
    "qwen3_moe": Case("qwen3_moe"),
    "llama-qlora": Case(tuning="qlora", overrides=_IN_BLOCKS),
}
LAYOUTS = {
    "ddp2": Layout(dp_replicate=2),
    "tp2": Layout(tp=2),
    "tp2-whole-logits": Layout(tp=2, sequence_parallel=False, loss_parallel=False),
    "fsdp2": Layout(dp_shard=2),
    "fsdp2xtp2": Layout(dp_shard=2, tp=2),
    "pp2": Layout(pp=2),
}
MORE = {
    "zero2": Layout(dp_shard=2, zero=2),
    "fsdp2-on-the-host": Layout(dp_shard=2, offload="params"),
    "ep2": Layout(dp_shard=2, ep=2),
    "cp2": Layout(cp=2),
    "cp2xfsdp2": Layout(cp=2, dp_shard=2),
    "cp2xtp2": Layout(cp=2, tp=2),
    "pp2-interleaved_1f1b": Layout(pp=2, pp_schedule="interleaved_1f1b"),
    "pp2-zbv": Layout(pp=2, pp_schedule="zbv"),
    "fsdp2xpp2": Layout(dp_shard=2, pp=2),
    "tp2xpp2": Layout(tp=2, pp=2),
}
"""For the grid."""


def _case(name: str, layers: int) -> Case:
    case = CASES[name]
    return replace(case, overrides=(*case.overrides, ("num_hidden_layers", layers), ("pad_token_id", 0)))


def _prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 40, (20,), generator=generator).tolist()
    return [torch.randint(24, 384, (length,), generator=generator).tolist() for length in lengths]


def _by_transformers(
    model: TunedModel, prompts: Sequence[list[int]], stop: Sequence[int], max_new_tokens: int
) -> list[list[int]]:
    """What `transformers.generate` answers to prompts that are padded on the left, up to the stop token."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=list(stop), pad_token_id=0, use_cache=True
    )
    model.eval()
    rows = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, longest:].tolist()
    ends = [next((i + 1 for i, token in enumerate(row) if token in stop), len(row)) for row in rows]
    return [row[:end] for row, end in zip(rows, ends, strict=True)]


def _engine(
    module: TunedModel, mesh: Mesh, stop: Sequence[int], *, batch_tokens: int, keep_gathered: bool
) -> RolloutEngine:
    model = StepModel(module, packed=True)
    inner = base_model(module)
    split = parallelize(inner, list(decoder_blocks(inner)[1]), mesh, compute=None)
    model.take(split)
    return RolloutEngine(
        model,
        mesh,
        split,
        autocast=nullcontext,
        stop_token_ids=stop,
        pad_token_id=0,
        batch_tokens=batch_tokens,
        keep_gathered=keep_gathered,
    )


def _own(mesh: Mesh) -> range:
    """The prompts of this data-parallel rank: of 20, the first has 13."""
    return range(20) if mesh.layout.dp == 1 else range(13) if mesh.dp_rank == 0 else range(13, 20)


def _answer_all(layout: Layout, layers: int) -> tuple[int, dict[str, list[Completion]]]:
    """The place of a rank among those with different data, and its answers by case and sampling."""
    mesh = build_mesh(layout, _CPU)
    prompts, own = _prompts(), _own(mesh)
    found: dict[str, list[Completion]] = {}
    for name in CASES if layout.ep == 1 else ["qwen3_moe"]:
        module = make_model(_case(name, layers))
        # room for 10 rows, so that some leave and others come
        engine = _engine(module, mesh, _STOP, batch_tokens=500, keep_gathered=name == "qwen3")
        found[f"{name} greedy"] = engine.generate([prompts[i] for i in own], _GREEDY)
        found[f"{name} sampled"] = engine.generate([prompts[i] for i in own], _SAMPLED, keys=own, logprobs=True)
        few = [0] if mesh.dp_rank == 0 else []  # the other rank of data has nothing to answer
        assert engine.generate([prompts[i] for i in few], _GREEDY) == found[f"{name} greedy"][: len(few)]
        assert engine.generate([], _GREEDY) == []
    return mesh.dp_rank, found


@cache
def _references(layers: int) -> dict[str, list[Completion]]:
    """The answers of one process."""
    torch.set_num_threads(1)
    [(_, found)] = run_ranks(1, partial(_answer_all, Layout(), layers))
    finished = [answer.finished for answers in found.values() for answer in answers]
    assert 20 < sum(finished) < len(finished) - 20
    return found


@pytest.mark.parametrize("name", CASES)
def test_greedy_answers_equal_transformers(name: str) -> None:
    expected = _by_transformers(make_model(_case(name, 2)), _prompts(), _STOP, _GREEDY.max_new_tokens)
    found = _references(2)[f"{name} greedy"]
    assert [answer.tokens for answer in found] == expected
    assert [answer.finished for answer in found] == [tokens[-1] in _STOP for tokens in expected]


@pytest.mark.parametrize("layout", [*LAYOUTS, *(pytest.param(name, marks=pytest.mark.grid) for name in MORE)])
def test_answers_under_a_layout_equal_those_of_one_process(layout: str) -> None:
    layers = 2 if layout in LAYOUTS else 4
    plan = {**LAYOUTS, **MORE}[layout]
    by_data: dict[int, dict[str, list[Completion]]] = {}
    for place, found in run_ranks(plan.world_size, partial(_answer_all, plan, layers)):
        assert by_data.setdefault(place, found) == found
    assert sorted(by_data) == list(range(plan.dp))
    for name in by_data[0]:
        together = [answer for place in range(plan.dp) for answer in by_data[place][name]]
        for answer, reference in zip(together, _references(layers)[name], strict=True):
            assert answer.tokens == reference.tokens
            assert answer.logprobs == pytest.approx(reference.logprobs, abs=1e-4)


def _train_with_answers(case: Case, layout: Layout | None) -> tuple[Curve, list[Completion]]:
    mesh = single(_CPU) if layout is None else build_mesh(layout, _CPU)
    found: list[Completion] = []

    def answer(model: StepModel, split: Parallelized) -> None:
        random, modes = torch.get_rng_state(), [part.training for part in model.module.modules()]
        gradients = [parameter.grad for parameter in model.module.parameters()]
        attention = base_model(model.module).config._attn_implementation
        engine = RolloutEngine(
            model, mesh, split, autocast=nullcontext, stop_token_ids=_STOP, pad_token_id=0, batch_tokens=200
        )
        found.extend(engine.generate(_prompts()[:3], _SAMPLED, logprobs=True))
        assert torch.equal(torch.get_rng_state(), random)
        assert [part.training for part in model.module.modules()] == modes
        assert [parameter.grad for parameter in model.module.parameters()] == gradients
        assert base_model(model.module).config._attn_implementation == attention

    return train(case, mesh, answer), found


@pytest.mark.parametrize(
    ("layout", "tuning"), [(None, "qlora"), ("fsdp2", "full"), ("tp2", "lora"), ("pp2", "full"), ("ddp2", "lora")]
)
def test_training_between_answers_is_as_without_them(layout: str | None, tuning: str) -> None:
    """And the tokens' probabilities change from step to step, since the weights do."""
    torch.set_num_threads(1)
    case = Case(tuning=tuning, recompute="full", dropout=0.0 if tuning == "full" else 0.3)
    plan = None if layout is None else LAYOUTS[layout]
    ranks = run_ranks(1 if plan is None else plan.world_size, partial(_train_with_answers, case, plan))
    assert_together_same([curve for curve, _ in ranks], alone(case))
    for _, answers in ranks:
        assert answers == ranks[0][1]
        assert all(before.logprobs != after.logprobs for before, after in pairwise(answers[::3]))


# --- the real model ------------------------------------------------------------------------------------------------

_ASKED = (
    *("What is the capital of France?", "Write a haiku about the sea.", "Name three colours.", "Who wrote Hamlet?"),
    *("Count from one to ten.", "Translate 'good morning' into Spanish.", "What is 12 times 7?", "Say hello."),
    *("Give me a short recipe for pancakes, with the ingredients first and the steps after them.", "Why is it dark?"),
)
_REMARK = " Answer as briefly as you can, and then add how sure you are of your answer."
_REAL_LAYOUTS = {
    "one": Layout(),
    **{name: LAYOUTS[name] for name in ("ddp2", "fsdp2", "pp2")},
    "tp3": Layout(tp=3),  # nine heads, which two ranks cannot share
}


@pytest.fixture(scope="module")
def real(smollm2_gguf: Path) -> tuple[PreTrainedModel, list[list[int]], list[int], list[list[int]]]:
    """SmolLM2-135M, 20 prompts of 31 to 60 tokens, its stop token, and what Transformers answers."""
    torch.set_num_threads(1)
    config = ModelConfig(model_name_or_path=str(smollm2_gguf))
    tokenizer = load_tokenizer(config)
    model = load_model(config, dtype=torch.float32, device=_CPU)
    chats = [[{"role": "user", "content": text}] for asked in _ASKED for text in (asked, asked + _REMARK)]
    prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]
    stop = [int(tokenizer.eos_token_id)]
    return model, prompts, stop, _by_transformers(model, prompts, stop, 10)


def _answer_really(
    model: PreTrainedModel, prompts: list[list[int]], stop: list[int], layout: Layout
) -> list[Completion]:
    mesh = build_mesh(layout, _CPU)
    engine = _engine(model, mesh, stop, batch_tokens=10_000, keep_gathered=True)
    return engine.generate([prompts[i] for i in _own(mesh)], Sampling(do_sample=False, max_new_tokens=10))


@pytest.mark.model
@pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=pytest.mark.grid if plan.dp > 1 else ()) for name, plan in _REAL_LAYOUTS.items()],
)
def test_greedy_answers_of_the_real_model_equal_transformers(
    layout: str, real: tuple[PreTrainedModel, list[list[int]], list[int], list[list[int]]]
) -> None:
    model, prompts, stop, expected = real
    plan = _REAL_LAYOUTS[layout]
    ranks = run_ranks(plan.world_size, partial(_answer_really, model, prompts, stop, plan))
    together = [answer.tokens for answers in ranks[:: plan.tp * plan.pp] for answer in answers]
    assert together == expected
    assert 0 < sum(tokens[-1] in stop for tokens in expected) < 20
