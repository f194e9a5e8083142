"""Answers on a GPU: steps replayed as CUDA graphs choose what steps run one by one choose."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import nn

from fourfold.generate.interface import Sampling
from fourfold.generate.rollout import Completion, RolloutEngine
from fourfold.models.forward import StepModel
from fourfold.parallel.apply import Parallelized
from fourfold.parallel.mesh import single
from tiny_models import tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

_CUDA = torch.device("cuda")
_STOP = tuple(range(8))
_SAMPLINGS = {
    "greedy": Sampling(do_sample=False, max_new_tokens=60),
    "sampled": Sampling(temperature=1.2, top_k=20, top_p=0.9, repetition_penalty=1.2, max_new_tokens=60, seed=1),
    "unfiltered": Sampling(temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=60),
}


def _prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 100, (40,), generator=generator).tolist()
    return [torch.randint(8, 384, (length,), generator=generator).tolist() for length in lengths]


def _answers(
    device: torch.device,
    sampling: Sampling,
    *,
    family: str = "llama",
    graphs: bool = False,
    batch_tokens: int = 100_000,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> list[Completion]:
    model = tiny_model(family, num_hidden_layers=2, head_dim=16)
    nn.Module.to(model, device)
    engine = RolloutEngine(
        StepModel(model, packed=True),
        single(device),
        Parallelized(model),
        autocast=autocast,
        stop_token_ids=_STOP,
        pad_token_id=0,
        batch_tokens=batch_tokens,
        graphs=graphs,
    )
    return engine.generate(_prompts(), sampling, logprobs=True)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss"])
@pytest.mark.parametrize("sampling", _SAMPLINGS)
def test_answers_on_a_gpu_are_those_of_a_cpu(sampling: str, family: str) -> None:
    expected = _answers(torch.device("cpu"), _SAMPLINGS[sampling], family=family)
    found = _answers(_CUDA, _SAMPLINGS[sampling], family=family)
    assert sum(a.tokens == b.tokens for a, b in zip(found, expected, strict=True)) >= 38  # fp32 rounds otherwise there


@pytest.mark.parametrize("batch_tokens", [2000, 100_000])
@pytest.mark.parametrize("sampling", _SAMPLINGS)
def test_answers_when_steps_are_replayed_are_the_same(sampling: str, batch_tokens: int) -> None:
    plain = _answers(_CUDA, _SAMPLINGS[sampling], batch_tokens=batch_tokens)
    replayed = _answers(_CUDA, _SAMPLINGS[sampling], graphs=True, batch_tokens=batch_tokens)
    assert sum(a.tokens == b.tokens for a, b in zip(plain, replayed, strict=True)) >= 38


def test_answers_when_steps_are_replayed_under_autocast_use_the_weights_of_the_moment() -> None:
    def autocast() -> AbstractContextManager[object]:
        return torch.autocast("cuda", torch.bfloat16)

    first = _answers(_CUDA, _SAMPLINGS["greedy"], graphs=True, autocast=autocast)
    again = _answers(_CUDA, _SAMPLINGS["greedy"], graphs=True, autocast=autocast)
    assert [answer.tokens for answer in first] == [answer.tokens for answer in again]
