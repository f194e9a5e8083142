"""Generation and export on a GPU."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fourfold.checkpoint.export import export
from fourfold.config.load import load
from fourfold.config.schema import Run
from fourfold.generate.interface import Sampling
from fourfold.serve.session import ChatSession
from fourfold.serve.speaker import load_speaker
from tiny_models import save_tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:inner dimension"),  # the tiny model's, for bitsandbytes' fast kernel
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("base"), hidden_size=64, head_dim=16)


def run_of(base: Path, **keys: Any) -> Run:
    return load({"model_name_or_path": str(base), "template": "chatml", **keys})


@pytest.mark.parametrize("keys", [{}, {"quantization_bit": 4}, {"quantization_bit": 8}, {"infer_dtype": "float16"}])
def test_chat_on_a_gpu_answers_and_stops_early(base: Path, keys: dict[str, Any]):
    speaker = load_speaker(run_of(base, **keys))
    session = ChatSession(speaker.engine, speaker.renderer, Sampling(max_new_tokens=32, seed=1))
    first = "".join(session.ask("Who are you?"))
    session.clear()
    assert "".join(session.ask("Who are you?")) == first
    session.clear()
    pieces = session.ask("Who are you?")
    next(pieces)
    pieces.close()
    assert len(session.history) == 2


def test_seed_on_a_gpu_leaves_the_random_state(base: Path):
    speaker = load_speaker(run_of(base))
    before = torch.cuda.get_rng_state()
    sampling = Sampling(max_new_tokens=16, top_p=1.0, top_k=0, seed=3)
    tokens = speaker.engine.generate([[5, 6, 7], [9]], sampling)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert speaker.engine.generate([[5, 6, 7], [9]], sampling) == tokens
    assert speaker.engine.generate([[5, 6, 7], [9]], replace(sampling, seed=4)) != tokens


@pytest.mark.parametrize("keys", [{}, {"quantization_bit": 4}, {"quantization_bit": 8}])
def test_export_on_a_gpu(base: Path, tmp_path: Path, keys: dict[str, Any]):
    result = export(
        run_of(base, export_dir=str(tmp_path / "out"), export_device="auto", infer_dtype="bfloat16", **keys)
    )
    assert result.comparison.largest < 0.1 * result.comparison.scale
    model = AutoModelForCausalLM.from_pretrained(result.folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
