"""The benchmark for one GPU, tried on the CPU with tiny shapes; and what it counts against."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import gpu_fourfold
import gpu_hf
from gpu import Bench, parse_arguments
from gpu_floor import FULL, LORA, flop_per_token, mfu, shape_of
from gpu_results import FILE, merge
from gpu_workloads import WORKLOADS
from word_tokenizer import random_text, word_tokenizer

ROOT = Path(__file__).parents[3]


def published(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "examples" / "models" / name / "config.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_script_when_run_tiny_measures_both_sides(tmp_path: Path) -> None:
    words = ["--tiny", "--only", "chat_bf16", "--sides", "fourfold,hf_tuned", "--warmup", "1", "--steps", "4"]
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *words, "--set", "seed=7", "--out", str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    cases = json.loads((tmp_path / FILE).read_text(encoding="utf-8"))["cases"]
    assert set(cases) == {"chat_bf16/fourfold[seed=7]", "chat_bf16/hf_tuned"}
    for found in cases.values():
        assert found["measured_steps"] == 4
        assert len(found["step_seconds"]) == 5
        assert found["tokens_per_sec"] > 0
        assert found["startup_s"] > found["step_seconds"][0]
        assert found["floor_tokens_per_sec"] > found["tokens_per_sec"]
        assert found["environment"]["torch"]


@pytest.mark.filterwarnings("ignore")  # of the peers
def test_pairs_when_run_tiny_are_the_same_work_for_both_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOURFOLD_CACHE", str(tmp_path / "cache"))
    bench = Bench("dpo", parse_arguments(["--tiny", "--warmup", "1", "--steps", "4"]), tmp_path)
    peer = bench.workload.peers["hf_tuned"]
    ours = gpu_fourfold.measure(bench.fourfold_job())
    theirs = gpu_hf.measure(bench.peer_job(peer, peer.settings[0]))
    assert ours["samples_per_step"] == theirs["samples_per_step"] == 4
    assert theirs["tokens_per_step"] == 4 * 2 * 48  # pairs, answers, positions
    assert ours["tokens_per_step"] == 4 * (2 * 48 - 17)  # what both answers begin with is laid down once
    # before anything is learnt the policy is the reference, and the loss ln 2
    assert ours["losses"][0] == pytest.approx(0.6931, abs=2e-3)
    assert theirs["losses"][0] == pytest.approx(0.6931, abs=2e-3)


def test_peers_when_listed_take_as_many_samples_a_step_and_have_a_program() -> None:
    for workload in WORKLOADS.values():
        for peer in workload.peers.values():
            assert (ROOT / "benchmarks" / peer.program).exists()
            assert {setting.micro_batch * setting.accumulation for setting in peer.settings} == {
                workload.samples_per_step
            }


@pytest.mark.skipif(importlib.util.find_spec("unsloth") is not None, reason="the package is there")
def test_side_when_its_package_is_missing_says_so(tmp_path: Path) -> None:
    bench = Bench("chat_bf16", parse_arguments(["--tiny"]), tmp_path)
    assert bench.run("unsloth_default") == {"missing": "unsloth is not installed"}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("Llama-3-8B", 8_030_261_248), ("Llama-3.2-3B", 3_212_749_824), ("Qwen3-30B-A3B", 30_532_122_624)],
)
def test_parameters_when_counted_are_the_published_ones(name: str, parameters: int) -> None:
    assert shape_of(published(name)).parameters == parameters


def test_flop_when_counted_leave_out_the_embedding_and_the_idle_experts() -> None:
    llama = shape_of(published("Llama-3-8B"))
    assert llama.active == pytest.approx(8_030_261_248 - 128_256 * 4096, rel=1e-4)  # all but the look-up, and norms
    assert flop_per_token(llama, LORA, 0) == 4 * llama.active
    # causal attention of 32 layers of 32 heads of 128: forward 2 x width x length, backward twice that
    assert flop_per_token(llama, FULL, 4096) - flop_per_token(llama, FULL, 0) == 6 * 32 * 32 * 128 * 4096
    mixture = shape_of(published("Qwen3-30B-A3B"))
    idle = 48 * (128 - 8) * 3 * 2048 * 768
    assert mixture.active == pytest.approx(30_532_122_624 - idle - 151_936 * 2048, rel=1e-4)


def test_mfu_when_given_a_known_run_is_what_was_told_of_it() -> None:
    # Transformers' Trainer on the 3B at 4,096 tokens: 17,075 tokens/s are 0.37 of 989 TFLOP/s
    assert mfu(shape_of(published("Llama-3.2-3B")), 4096, 17_075) == pytest.approx(0.37, abs=0.005)


def test_merge_when_a_case_is_there_replaces_only_it(tmp_path: Path) -> None:
    merge(tmp_path, "a/fourfold", {"tokens_per_sec": 1})
    merge(tmp_path, "b/fourfold", {"tokens_per_sec": 2})
    merge(tmp_path, "a/fourfold", {"tokens_per_sec": 3})
    found = json.loads((tmp_path / FILE).read_text(encoding="utf-8"))
    assert found["cases"] == {"a/fourfold": {"tokens_per_sec": 3}, "b/fourfold": {"tokens_per_sec": 2}}


def test_word_tokenizer_when_given_made_up_text_makes_one_token_a_word() -> None:
    tokenizer = word_tokenizer(512)
    assert len(tokenizer) == 512
    ids = tokenizer.encode(random_text(random.Random(0), 50, 512), add_special_tokens=False)
    assert len(ids) == 50
    assert tokenizer.unk_token_id not in ids
    header = tokenizer.encode("<|start_header_id|>user<|end_header_id|>\n\nthe water<|eot_id|>")
    assert len(header) == 7
