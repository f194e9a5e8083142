import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fourfold.base.errors import ModelError
from fourfold.generate.huggingface import HuggingFaceEngine
from fourfold.generate.interface import Sampling

STOP = "<|end|>"
GREEDY = Sampling(do_sample=False, max_new_tokens=12)
PROMPT = [10, 20, 30, 40]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(STOP, special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=STOP, pad_token=STOP)


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


def greedy_by_hand(model: LlamaForCausalLM, prompt: Sequence[int], count: int) -> list[int]:
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_generate_greedily_equals_argmax_of_the_logits(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast):
    engine = HuggingFaceEngine(model, tokenizer, [])
    assert engine.generate([PROMPT], GREEDY) == [greedy_by_hand(model, PROMPT, 12)]


def test_generate_of_a_batch_equals_each_prompt_alone(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast):
    engine = HuggingFaceEngine(model, tokenizer, [])
    prompts = [PROMPT, [7], [1, 2, 3, 4, 5, 6, 7, 8, 9]]
    assert engine.generate(prompts, GREEDY) == [engine.generate([prompt], GREEDY)[0] for prompt in prompts]


@pytest.mark.parametrize("with_cache", [True, False])
def test_generate_ends_before_the_stop_token(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, with_cache: bool
):
    expected = greedy_by_hand(model, PROMPT, 12)
    stop = expected[4]
    engine = HuggingFaceEngine(model, tokenizer, [stop, 3], use_cache=with_cache)
    others = [9, 8, 7]
    answers = engine.generate([PROMPT, others], GREEDY)
    assert answers[0] == expected[: expected.index(stop)]
    assert stop not in answers[1]


@pytest.mark.parametrize("skip_special_tokens", [True, False])
def test_stream_is_the_text_of_generate(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, skip_special_tokens: bool
):
    stop = greedy_by_hand(model, PROMPT, 12)[6]
    engine = HuggingFaceEngine(model, tokenizer, [stop], skip_special_tokens=skip_special_tokens)
    tokens = engine.generate([PROMPT], GREEDY)[0]
    text = tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)
    assert "".join(engine.stream(PROMPT, GREEDY)) == text


def test_stream_with_beams_gives_the_best_beam(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast):
    engine = HuggingFaceEngine(model, tokenizer, [3])
    sampling = replace(GREEDY, num_beams=3, length_penalty=0.5)
    tokens = engine.generate([PROMPT], sampling)[0]
    assert list(engine.stream(PROMPT, sampling)) == [tokenizer.decode(tokens, skip_special_tokens=True)]


def test_stream_closed_early_stops_the_generation(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast):
    calls = count_calls(model)
    pieces = HuggingFaceEngine(model, tokenizer, []).stream([10] * 4, replace(GREEDY, max_new_tokens=60))
    next(pieces)
    pieces.close()
    assert calls() < 60
    assert not [thread for thread in threading.enumerate() if thread.name == "generate"]


def count_calls(model: LlamaForCausalLM) -> Callable[[], int]:
    seen: list[None] = []
    model.register_forward_hook(lambda *_: seen.append(None))
    return lambda: len(seen)


def test_stream_raises_what_the_model_raises(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast):
    engine = HuggingFaceEngine(model, tokenizer, [])
    with pytest.raises(IndexError):
        list(engine.stream([len(tokenizer) + 1], GREEDY))


def test_seed_repeats_the_answer_and_leaves_the_random_state(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
):
    engine = HuggingFaceEngine(model, tokenizer, [])
    sampling = Sampling(max_new_tokens=20, top_p=1.0, top_k=0, seed=7)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = engine.generate([PROMPT], sampling)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert engine.generate([PROMPT], sampling) == first
    assert engine.generate([PROMPT], replace(sampling, seed=8)) != first


def test_greedy_ignores_the_models_own_sampling(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast):
    engine = HuggingFaceEngine(model, tokenizer, [])
    expected = engine.generate([PROMPT], GREEDY)
    own = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=3.0, top_p=0.9, top_k=3, repetition_penalty=1.5, max_length=6, eos_token_id=4
    )
    try:
        assert engine.generate([PROMPT], GREEDY) == expected
        assert engine.generate([PROMPT], replace(GREEDY, do_sample=True, temperature=0.0)) == expected
    finally:
        model.generation_config = own


def test_generate_leaves_the_training_mode_as_it_was(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast):
    engine = HuggingFaceEngine(model, tokenizer, [])
    expected = engine.generate([PROMPT], GREEDY)
    model.train()
    try:
        assert engine.generate([PROMPT], GREEDY) == expected
        assert model.training
    finally:
        model.eval()


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(do_sample=False, max_new_tokens=100), 60),
        (Sampling(do_sample=False, max_length=10), 6),
        (Sampling(do_sample=False, max_new_tokens=2, max_length=10), 6),
    ],
)
def test_answer_ends_with_the_context(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, sampling: Sampling, expected: int
):
    engine = HuggingFaceEngine(model, tokenizer, [])
    assert len(engine.generate([PROMPT], sampling)[0]) == expected


def test_prompt_as_long_as_the_context_is_refused(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast):
    engine = HuggingFaceEngine(model, tokenizer, [])
    with pytest.raises(ModelError, match=r"has 64 tokens, but prompt and answer together may have 64\."):
        list(engine.stream([5] * 64, GREEDY))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it by its old name
def test_generate_with_an_adapter_equals_the_merged_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast):
    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    try:
        with_adapter = HuggingFaceEngine(adapted, tokenizer, [3]).generate([PROMPT, [7]], GREEDY)
        streamed = "".join(HuggingFaceEngine(adapted, tokenizer, [3]).stream(PROMPT, GREEDY))
        assert streamed == tokenizer.decode(with_adapter[0], skip_special_tokens=True)
        adapted.merge_adapter()
        assert HuggingFaceEngine(adapted, tokenizer, [3]).generate([PROMPT, [7]], GREEDY) == with_adapter
    finally:
        adapted.unmerge_adapter()
        adapted.unload()
