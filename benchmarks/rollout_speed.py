"""Tokens per second of answers with the weights that are trained, and of `transformers.generate`, in turn.

    python benchmarks/rollout_speed.py models/SmolLM2-135M-Instruct.Q4_1.gguf   a real model, on a CPU or a GPU
    python benchmarks/rollout_speed.py --prompts 64 --new-tokens 256            random weights of a 1B shape, in bf16

Both answer greedily and their answers are compared. With a real model they end where the model ends them; transformers
goes on with a row until the last one has ended, and only real tokens are counted.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from fourfold.config.model import ModelConfig
from fourfold.generate.interface import Sampling
from fourfold.generate.rollout import RolloutEngine
from fourfold.models.forward import StepModel
from fourfold.models.load import load_model
from fourfold.models.tokenizer import load_tokenizer
from fourfold.parallel.apply import Parallelized
from fourfold.parallel.mesh import single

_QUESTIONS = (
    *("What is the capital of France?", "Write a haiku about the sea.", "Name three colours.", "Who wrote Hamlet?"),
    *("Count from one to ten.", "Translate 'good morning' into Spanish.", "What is 12 times 7?", "Say hello."),
    *("Give me a short recipe for pancakes, with the ingredients first and the steps after them.", "Why is it dark?"),
)
_REMARK = " Answer as briefly as you can, and then add how sure you are of your answer."


def real(path: str, count: int, device: torch.device) -> tuple[PreTrainedModel, list[list[int]], list[int]]:
    """A model from a file, prompts of mixed lengths, and its stop token."""
    config = ModelConfig(model_name_or_path=path)
    tokenizer = load_tokenizer(config)
    texts = [question + _REMARK * number for number in range(-(-count // len(_QUESTIONS))) for question in _QUESTIONS]
    chats = [[{"role": "user", "content": text}] for text in texts[:count]]
    prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return load_model(config, dtype=dtype, device=device), prompts, [int(tokenizer.eos_token_id)]


def made_up(count: int, device: torch.device) -> tuple[PreTrainedModel, list[list[int]], list[int]]:
    """Random weights of the shape of Llama 3.2 1B, prompts of 32 to 512 tokens, and no stop token."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(32, 513, (count,), generator=generator).tolist()
    prompts = [torch.randint(0, 128000, (length,), generator=generator).tolist() for length in lengths]
    return model.eval(), prompts, []


def by_transformers(model: PreTrainedModel, prompts: list[list[int]], stop: list[int], count: int) -> list[list[int]]:
    """Its answers to prompts padded on the left, up to the stop token."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    config = GenerationConfig(do_sample=False, max_new_tokens=count, pad_token_id=0, use_cache=True)
    config.eos_token_id = stop or None
    rows = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, longest:].tolist()
    ends = [next((i + 1 for i, token in enumerate(row) if token in stop), len(row)) for row in rows]
    return [row[:end] for row, end in zip(rows, ends, strict=True)]


def timed(work: Callable[[], list[list[int]]]) -> tuple[list[list[int]], float]:
    """What it returns, and tokens per second."""
    start = time.perf_counter()
    answers = work()  # on the host, so the device has finished
    return answers, sum(map(len, answers)) / (time.perf_counter() - start)


def main() -> None:
    """Measure in turn and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-graphs", action="store_true")
    asked = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = real(asked.model, asked.prompts, device) if asked.model else made_up(asked.prompts, device)
    model, prompts, stop = found
    own = model.config._attn_implementation or "sdpa"
    engine = RolloutEngine(
        StepModel(model, packed=True),
        single(device),
        Parallelized(model),
        autocast=nullcontext,
        stop_token_ids=stop,
        pad_token_id=0,
        batch_tokens=1_000_000,
        graphs=not asked.no_graphs,
    )
    packed = model.config._attn_implementation
    sampling = Sampling(do_sample=False, max_new_tokens=asked.new_tokens)
    speeds: dict[str, list[float]] = {"transformers": [], "fourfold": []}
    for number in range(asked.rounds):
        model.set_attn_implementation(own)
        expected, speed = timed(lambda: by_transformers(model, prompts, stop, asked.new_tokens))
        speeds["transformers"].append(speed)
        model.set_attn_implementation(packed)
        answers, speed = timed(lambda: [answer.tokens for answer in engine.generate(prompts, sampling)])
        speeds["fourfold"].append(speed)
        same = sum(a == b for a, b in zip(answers, expected, strict=True))
        line = ", ".join(f"{name} {values[-1]:.1f}" for name, values in speeds.items())
        print(f"round {number}: {line} tokens/s; {same} of {len(prompts)} answers are the same", flush=True)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    ratio = medians["fourfold"] / medians["transformers"]
    print(", ".join(f"{name} {speed:.1f}" for name, speed in medians.items()), f"tokens/s (medians), {ratio:.2f}x")


if __name__ == "__main__":
    main()
