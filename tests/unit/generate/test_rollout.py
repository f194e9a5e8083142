from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fourfold.base.errors import ConfigError, ModelError
from fourfold.generate.interface import Sampling
from fourfold.generate.rollout import Completion, RolloutEngine
from fourfold.generate.rollout.sampler import candidates, choose, penalize, state_of
from fourfold.models.forward import StepModel
from fourfold.parallel.apply import Parallelized
from fourfold.parallel.mesh import single
from tiny_models import tiny_model

_MESH = single(torch.device("cpu"))
GREEDY = Sampling(do_sample=False, max_new_tokens=12)
SAMPLED = Sampling(temperature=0.9, top_p=0.95, top_k=30, max_new_tokens=10, seed=5)
PROMPTS = [[10, 20, 30, 40], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9], [300, 200], [50] * 20, [60, 61, 62]]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama", num_hidden_layers=2, max_position_embeddings=64)


def engine_of(model: PreTrainedModel, stop: Sequence[int] = (), batch_tokens: int = 10_000) -> RolloutEngine:
    return RolloutEngine(
        StepModel(model, packed=True),
        _MESH,
        Parallelized(model),
        autocast=nullcontext,
        stop_token_ids=stop,
        pad_token_id=0,
        batch_tokens=batch_tokens,
    )


def tokens_of(answers: Sequence[Completion]) -> list[list[int]]:
    return [answer.tokens for answer in answers]


def logits_after(model: PreTrainedModel, tokens: Sequence[int]) -> Tensor:
    """[vocabulary], without a cache and without company."""
    with torch.no_grad():
        return model(torch.tensor([list(tokens)]), lengths=(len(tokens),), use_cache=False).logits[0, -1]


def greedy_by_hand(model: PreTrainedModel, prompt: Sequence[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(logits_after(model, tokens).argmax()))
    return tokens[len(prompt) :]


# --- what is answered ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_tokens", [1, 70, 10_000])
def test_greedy_answers_equal_argmax_whatever_room_there_is(model: PreTrainedModel, batch_tokens: int) -> None:
    engine = engine_of(model, batch_tokens=batch_tokens)
    assert tokens_of(engine.generate(PROMPTS, GREEDY)) == [greedy_by_hand(model, prompt, 12) for prompt in PROMPTS]
    assert tokens_of(engine.generate(PROMPTS, replace(SAMPLED, temperature=0.0))) == [
        greedy_by_hand(model, prompt, 10) for prompt in PROMPTS
    ]


def test_answer_when_a_stop_token_comes_ends_with_it(model: PreTrainedModel) -> None:
    whole = [greedy_by_hand(model, prompt, 12) for prompt in PROMPTS]
    stop = (whole[0][4], whole[2][0])
    ends = [next((i + 1 for i, token in enumerate(tokens) if token in stop), 12) for tokens in whole]
    for batch_tokens in (70, 10_000):
        answers = engine_of(model, stop, batch_tokens).generate(PROMPTS, GREEDY)
        assert tokens_of(answers) == [tokens[:end] for tokens, end in zip(whole, ends, strict=True)]
        assert [answer.finished for answer in answers] == [
            tokens[end - 1] in stop for tokens, end in zip(whole, ends, strict=True)
        ]
    assert ends[2] == 1


@pytest.mark.parametrize(
    ("sampling", "lengths"),
    [
        (replace(GREEDY, max_new_tokens=100), [60, 63]),
        (replace(GREEDY, max_length=10), [6, 9]),
        (replace(GREEDY, max_new_tokens=2, max_length=10), [6, 9]),
        (replace(GREEDY, max_new_tokens=1), [1, 1]),
    ],
)
def test_answer_ends_with_its_own_room(model: PreTrainedModel, sampling: Sampling, lengths: list[int]) -> None:
    answers = engine_of(model).generate(PROMPTS[:2], sampling)
    assert [len(answer.tokens) for answer in answers] == lengths
    assert not any(answer.finished for answer in answers)


def test_logprobs_are_those_of_the_model_at_temperature_1(model: PreTrainedModel) -> None:
    sampling = replace(SAMPLED, temperature=2.0, repetition_penalty=1.3)
    answers = engine_of(model).generate(PROMPTS, sampling, logprobs=True)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        expected = [
            float(logits_after(model, [*prompt, *answer.tokens[:i]]).log_softmax(-1)[token])
            for i, token in enumerate(answer.tokens)
        ]
        assert answer.logprobs == pytest.approx(expected, abs=1e-4)
    assert all(answer.logprobs == [] for answer in engine_of(model).generate(PROMPTS, sampling))


def test_repetition_penalty_equals_that_of_transformers(model: PreTrainedModel) -> None:
    found = engine_of(model, batch_tokens=70).generate(PROMPTS, replace(GREEDY, repetition_penalty=1.5))
    processor = RepetitionPenaltyLogitsProcessor(1.5)
    for prompt, answer in zip(PROMPTS, found, strict=True):
        tokens = list(prompt)
        for token in answer.tokens:
            scores = processor(torch.tensor([tokens]), logits_after(model, tokens)[None])
            assert token == int(scores.argmax())
            tokens.append(token)


# --- randomness ------------------------------------------------------------------------------------------------------


def test_sampled_answer_depends_on_its_key_and_not_on_its_company(model: PreTrainedModel) -> None:
    keys = [100 + i for i in range(len(PROMPTS))]
    together = engine_of(model).generate(PROMPTS, SAMPLED, keys=keys)
    backwards = engine_of(model, batch_tokens=70).generate(PROMPTS[::-1], SAMPLED, keys=keys[::-1])
    assert backwards == together[::-1]
    for prompt, key, answer in zip(PROMPTS, keys, together, strict=True):
        assert engine_of(model).generate([prompt], SAMPLED, keys=[key]) == [answer]
    again = engine_of(model).generate([PROMPTS[0]] * 8, SAMPLED)
    assert len({tuple(answer.tokens) for answer in again}) > 4
    other = engine_of(model).generate(PROMPTS, replace(SAMPLED, seed=6), keys=keys)
    assert sum(a != b for a, b in zip(together, other, strict=True)) > 3


def test_sampled_tokens_are_among_those_that_transformers_leaves(model: PreTrainedModel) -> None:
    sampling = Sampling(temperature=1.7, top_k=5, top_p=0.8, repetition_penalty=1.4, max_new_tokens=10)
    processors: Any = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(1.4),
            TemperatureLogitsWarper(1.7),
            TopKLogitsWarper(5),
            TopPLogitsWarper(0.8),
        ]
    )
    found = engine_of(model).generate(PROMPTS, sampling)
    chosen = 0
    for prompt, answer in zip(PROMPTS, found, strict=True):
        tokens = list(prompt)
        for token in answer.tokens:
            scores = processors(torch.tensor([tokens]), logits_after(model, tokens)[None])[0]
            assert scores[token] > float("-inf")
            chosen += token != int(scores.argmax())
            tokens.append(token)
    assert chosen > 5


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (7, 1.0), (0, 0.6), (7, 0.6), (100, 0.01), (1, 1.0)])
def test_candidates_are_those_of_transformers(top_k: int, top_p: float) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(40, 50, generator=generator).mul(3).round_(decimals=0)  # with many ties
    for values in (scores, torch.randn(40, 50, generator=generator)):
        expected = values
        if top_k:
            expected = TopKLogitsWarper(top_k)(torch.empty(0), expected)  # type: ignore[arg-type]
        if top_p < 1:
            expected = TopPLogitsWarper(top_p)(torch.empty(0), expected)  # type: ignore[arg-type]
        found, ids = candidates(values, top_k, top_p)
        whole = torch.full_like(values, float("-inf")).scatter(1, ids.expand(len(values), -1), found)
        if top_p == 1 or values is not scores:  # which of several ties stays is nobody's to say
            assert torch.equal(whole, expected)
        assert torch.equal(whole.sort(-1).values, expected.sort(-1).values)


@pytest.mark.parametrize("vary", ["keys", "positions"])
@pytest.mark.parametrize(("top_k", "kept"), [(0, 6), (3, 3)])
def test_choose_draws_from_the_softmax(vary: str, top_k: int, kept: int) -> None:
    count = 40_000
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])
    keys = range(count) if vary == "keys" else [7] * count
    states = torch.tensor([state_of(3, key) for key in keys], dtype=torch.int32)
    positions = torch.zeros(count, dtype=torch.int64) if vary == "keys" else torch.arange(count)
    sampling = Sampling(temperature=2.0, top_k=top_k, top_p=1.0)
    choice = choose(logits.expand(count, -1), sampling, states, positions, None, logprobs=True)
    shares = torch.bincount(choice.tokens, minlength=6) / count
    expected = torch.where(torch.arange(6) < kept, logits / 2, float("-inf")).softmax(-1)
    assert float((shares - expected).abs().max()) < 5 * (0.25 / count) ** 0.5
    assert choice.logprobs is not None
    assert torch.allclose(choice.logprobs, logits.log_softmax(-1)[choice.tokens])


def test_choose_when_a_token_is_rare_draws_it_as_often_as_it_should() -> None:
    """One in 20000: noise of too few bits would never, or too often, let it win."""
    count = 400_000
    logits = torch.tensor([0.0, -9.9034])
    states = torch.tensor([state_of(0, 1)], dtype=torch.int32).expand(count)
    sampling = Sampling(temperature=1.0, top_k=0, top_p=1.0)
    choice = choose(logits.expand(count, -1), sampling, states, torch.arange(count), None, logprobs=False)
    assert 4 <= int(choice.tokens.sum()) <= 45  # 20 is expected, 5 the deviation


def test_penalize_when_seen_moves_scores_towards_less_likely() -> None:
    scores, seen = torch.tensor([[2.0, -2.0, 2.0, -2.0]]), torch.tensor([[True, True, False, False]])
    assert penalize(scores, seen, 2.0).tolist() == [[1.0, -4.0, 2.0, -2.0]]


# --- the model afterwards --------------------------------------------------------------------------------------------


def test_generate_leaves_model_and_random_state_as_they_were(model: PreTrainedModel) -> None:
    engine = engine_of(model)
    model.train()
    model.model.layers[0].eval()
    try:
        modes = [part.training for part in model.modules()]
        torch.manual_seed(1)
        before = torch.random.get_rng_state()
        engine.generate(PROMPTS, SAMPLED)
        assert torch.equal(torch.random.get_rng_state(), before)
        assert [part.training for part in model.modules()] == modes
        assert model.config._attn_implementation == "fourfold"
        assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    finally:
        model.eval()


def test_generate_when_the_model_fails_leaves_it_as_it_was(model: PreTrainedModel) -> None:
    engine = engine_of(model)
    model.train()
    try:
        with pytest.raises(IndexError):
            engine.generate([[100_000]], GREEDY)
        assert model.training
        assert model.config._attn_implementation == "fourfold"
    finally:
        model.eval()


def test_generate_under_autocast_uses_the_weights_of_the_moment() -> None:
    """Casts of weights are kept for a call, and not for the next."""
    model = tiny_model("llama")
    engine = RolloutEngine(
        StepModel(model, packed=True),
        _MESH,
        Parallelized(model),
        autocast=lambda: torch.autocast("cpu", torch.bfloat16),
        stop_token_ids=(),
        pad_token_id=0,
        batch_tokens=1000,
    )
    before = engine.generate(PROMPTS, GREEDY, logprobs=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    after = engine.generate(PROMPTS, GREEDY, logprobs=True)
    assert all(a.logprobs != b.logprobs for a, b in zip(before, after, strict=True))


# --- what is refused -------------------------------------------------------------------------------------------------


def test_generate_with_beams_is_refused(model: PreTrainedModel) -> None:
    with pytest.raises(ConfigError, match=r"^num_beams: 3 cannot be used while training, .* Use num_beams: 1\.$"):
        engine_of(model).generate(PROMPTS, replace(GREEDY, num_beams=3))


@pytest.mark.parametrize("prompt", [[], [5] * 64])
def test_prompt_without_room_is_refused(model: PreTrainedModel, prompt: list[int]) -> None:
    with pytest.raises(ModelError, match=rf"^A prompt has {len(prompt)} tokens, .* together may have 64\."):
        engine_of(model).generate([[1], prompt], GREEDY)


def test_model_with_a_recurrent_state_is_refused() -> None:
    config = MambaConfig(vocab_size=64, hidden_size=8, num_hidden_layers=1, state_size=4)
    model = MambaForCausalLM(config).eval()
    step_model = StepModel(model, packed=False)
    with pytest.raises(ModelError, match="^mamba: answers cannot be generated while training"):
        RolloutEngine(
            step_model,
            _MESH,
            Parallelized(model),
            autocast=nullcontext,
            stop_token_ids=(),
            pad_token_id=0,
            batch_tokens=100,
        )


# --- other families --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "deepseek_v3", "cohere2", "smollm3", "mistral", "phi3"])
def test_greedy_answers_of_a_family_equal_transformers(family: str) -> None:
    """Soft-capped scores, sinks, narrower values, windows shorter than the answer."""
    model = tiny_model(family, pad_token_id=0)
    longest = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    model.set_attn_implementation("eager")
    config = GenerationConfig(do_sample=False, max_new_tokens=20, use_cache=True, pad_token_id=0)
    config.eos_token_id = None
    expected = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, longest:].tolist()
    assert tokens_of(engine_of(model).generate(PROMPTS, replace(GREEDY, max_new_tokens=20))) == expected
