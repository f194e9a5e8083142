"""The benchmark for several GPUs: its tables, its file, its verdicts, and all of it tried on two CPU processes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import multi_equality
from fourfold.dataset.batch import Example, Sample
from fourfold.parallel.mesh import single
from fourfold.planning.axes import ModelFacts, check_layout
from fourfold.planning.candidates import facts_of
from fourfold.planning.hardware import find_device
from fourfold.planning.hardware_file import read_hardware
from fourfold.planning.memory import estimate_memory
from multi_check import verdicts
from multi_equality import compare, curve, write_model
from multi_faults import STEPS
from multi_gpu import POINTS, cases_of, parse_arguments, seconds_of
from multi_job import Plan, run_job
from multi_layouts import LAYOUTS, METHODS, MODELS, SCHEDULES, Variant, equality_cases, layers_of, parse, reference_of
from multi_links import SIZES, catalogue_figures, hardware_file, sent_bytes
from multi_predict import predict
from multi_results import FILE, Results
from multi_speeds import SPEEDS, Speed, speed_cases
from multi_throughput import bubble_of, merge_ranks, point_of
from rehearsed import described

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "multi_gpu.py"


def run_script(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, words)], capture_output=True, text=True, check=False)


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    return json.loads((folder / FILE).read_text(encoding="utf-8"))["rows"]


def test_layouts_when_compared_fit_the_model() -> None:
    entries = MODELS["qwen3_moe"]
    sizes = [entries[key] for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "num_experts")]
    for name, layout in LAYOUTS.items():
        assert check_layout(layout, ModelFacts(layers_of(layout), *sizes)) == [], name
        assert layout.world_size in (2, 4, 8), name


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_layouts_when_of_so_many_ranks_have_every_schedule_and_method(ranks: int) -> None:
    layouts = [LAYOUTS[parse(name)[1]] for name in equality_cases(ranks)]
    assert {layout.pp_schedule for layout in layouts if layout.pp == ranks} == set(SCHEDULES)
    assert {layout.cp_method for layout in layouts if layout.cp == ranks} == set(METHODS)
    assert {layout.zero for layout in layouts if layout.dp_shard == ranks} == {1, 2, 3}
    most = max(sum(size > 1 for size in layout.sizes().values()) for layout in layouts)
    assert most >= {2: 1, 4: 2, 8: 3}[ranks]
    assert not [name for name in equality_cases(ranks) if "/llama/" in name and LAYOUTS[parse(name)[1]].ep > 1]


def test_speed_cases_when_predicted_fit_an_h100(tmp_path: Path) -> None:
    card = find_device("h100")
    for name, case in SPEEDS.items():
        point = point_of(case, tmp_path, 0, is_tiny=False)
        _, shape, job = described(point)
        memory = estimate_memory(shape, job, point.layout, point.recompute, sum(point.sequences), device=card)
        assert memory.device <= card.memory_bytes, name
        assert check_layout(point.layout, facts_of(shape)) == [], name


def _fields(case: Speed) -> dict[str, Any]:
    names = ("model", "tuning", "recompute", "sequences", "batches", "layers")
    return {"layout": case.layout.as_dict(), **{name: getattr(case, name) for name in names}}


def test_speed_cases_when_listed_name_what_was_cut_and_begin_with_one_gpu() -> None:
    first = ("8b-lora-one", "30b-16layers-lora-one", "8b-full-fsdp8")
    assert speed_cases(8)[:3] == [f"throughput/8/{name}" for name in first]
    for name, case in SPEEDS.items():
        assert not case.layers or f"{case.layers} of " in case.note, name
        assert case.ranks in (1, 2, 4, 8)


def test_reference_when_stages_need_more_layers_has_as_many() -> None:
    assert reference_of("equality/4/llama/bf16/lora/pp4-zbv") == "equality/1/llama/bf16/lora/one-8layers"
    assert reference_of("equality/2/qwen3_moe/fp32/full/ep2") == "equality/1/qwen3_moe/fp32/full/one-4layers"


@pytest.mark.parametrize("point", POINTS)
def test_cases_when_listed_have_a_time(point: str) -> None:
    names = cases_of(point, 2)
    assert len(set(names)) == len(names) > 0
    assert all(name.startswith(f"{point}/2") and seconds_of(name, is_tiny=False) > 0 for name in names)


def test_arguments_when_a_point_is_unknown_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(["--tiny", "--only", "links,speed"])
    assert "there is no speed" in capsys.readouterr().err


def test_compare_when_ranks_differ_tells_the_largest() -> None:
    reference = {"losses": [2.0, 1.0], "norms": [4.0, 2.0]}
    ranks = [
        {"losses": [2.0, 1.5], "norms": [4.0, 2.0], "peak_allocated_gib": 1.0},
        {"losses": [2.0, 1.0], "norms": [5.0, 2.0], "peak_allocated_gib": 2.0},
    ]
    found = compare(ranks, reference)
    assert found["largest_difference"] == 0.5
    assert found["mean_difference"] == 0.25
    assert found["largest_norm_difference"] == 0.25
    assert found["peak_allocated_gib"] == [1.0, 2.0]
    ranks[1]["losses"] = [float("nan"), 1.0]
    assert compare(ranks, reference)["largest_difference"] != compare(ranks, reference)["largest_difference"]


def test_losses_when_sequences_are_cut_in_two_are_another_curve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model must be such that a layout which loses half of what attention sees cannot pass."""
    folder, mesh = write_model(tmp_path, "llama", 4, is_tiny=True), single(torch.device("cpu"))
    variant = Variant("llama", "fp32", "full")
    whole = curve(variant, folder, mesh, is_tiny=True)
    made = multi_equality.make_steps

    def halves(*arguments: int) -> list[list[Sample]]:
        return [[_halved(sample) for sample in samples] for samples in made(*arguments)]

    monkeypatch.setattr(multi_equality, "make_steps", halves)
    found = compare([curve(variant, folder, mesh, is_tiny=True)], whole)
    assert found["mean_difference"] > 1e-2
    assert compare([whole], whole)["largest_difference"] == 0


def _halved(sample: Sample) -> Sample:
    example = sample.sequences[""]
    half = len(example) // 2
    cut = Example(example.input_ids, example.labels, (half, len(example) - half))
    return Sample({"": cut}, sample.index)


@pytest.mark.parametrize("other", [4, 16])
def test_bubble_when_a_pass_is_as_the_formula_says_is_its_share(other: int) -> None:
    # 1f1b: a pass of m micro-batches of 2 s over p ranks takes (m + p - 1) 2 s, of which p - 1 are idle
    each, share = bubble_of(2 * (8 + 3), 2 * (other + 3), 8, other)
    assert each == pytest.approx(2)
    assert share == pytest.approx(3 / 11)


def test_ranks_when_merged_give_the_slowest_time_and_each_memory() -> None:
    fast = {"step_s": 1.0, "tokens_per_sec_per_gpu": 8.0, "losses": [1.0], "loaded_gib": 1.0, "allocated_gib": 2.0}
    slow = {**fast, "step_s": 2.0, "tokens_per_sec_per_gpu": 4.0, "allocated_gib": 3.0}
    rows = [{**row, "reserved_gib": 5.0} for row in (fast, slow)]
    found = merge_ranks([*rows, None])
    assert found["ranks"] == 2
    assert (found["step_s"], found["tokens_per_sec_per_gpu"]) == (2.0, 4.0)
    assert found["allocated_gib"] == [2.0, 3.0]


def test_links_when_rates_are_known_become_the_catalogues_figures(tmp_path: Path) -> None:
    assert sent_bytes("all_gather", 800, 4) == 600
    assert sent_bytes("all_reduce", 800, 4) == 1200
    assert sent_bytes("send_recv", 800, 4) == 800
    rows = [[float(size), 30e-6 + 0.75 * size / 400e9, 0.0] for size in SIZES]
    rates = {
        name: [[size, seconds, 1e-9 * sent_bytes(name, int(size), 4) / seconds] for size, seconds, _ in rows]
        for name in ("all_gather", "reduce_scatter")
    }
    found = catalogue_figures(rates, ranks=4)
    assert found["link_gb_s"] == pytest.approx(400, rel=0.02)
    assert found["latency_us"] == pytest.approx(10, rel=0.01)
    file = tmp_path / "hardware.yaml"
    file.write_text(hardware_file({"ranks": 4, **found}, "h100", 9.8), encoding="utf-8")
    cluster = read_hardware(file)
    assert cluster.per_node == 4
    assert cluster.device.link.attained_bytes_per_s == pytest.approx(1e9 * found["link_gb_s"], rel=1e-3)
    assert cluster.device.host_op_s == pytest.approx(9.8e-6)


def test_prediction_when_the_link_is_measured_slower_takes_longer() -> None:
    row = {"fields": _fields(SPEEDS["8b-lora-tp2"]), "host_op_us": 9.8}
    found = predict(row, "h100", {"link_gb_s": 50.0, "latency_us": 20.0})
    assert found["predicted_step_s_by_measured_link"] > found["predicted_step_s"]
    assert "unpredicted" in predict(row, "abacus")


def test_results_when_a_call_goes_on_keep_what_is_there(tmp_path: Path) -> None:
    results = Results(tmp_path / FILE)
    call = results.begin_call({"gpu": "h100"})
    results.put("a", {"step_s": 1}, call)
    results.put("b", {"error": "no"}, call)
    assert results.done(failed_too=True) == {"a", "b"}
    assert results.done(failed_too=False) == {"a"}
    assert results.gpu_of(results.rows()["a"]) == "h100"
    other = Results(tmp_path / "other" / FILE)
    other.put("b", {"step_s": 2}, "later")
    other.take_in(results.file)
    assert {name: row.get("step_s") for name, row in other.rows().items()} == {"a": 1, "b": 2}


def outcomes(rows: dict[str, dict[str, Any]]) -> list[bool]:
    return [verdict.passed for verdict in verdicts(rows)]


@pytest.mark.parametrize(
    ("name", "figures", "expected"),
    [
        ("llama/fp32/full/tp2", {"largest_difference": 9e-6, "largest_norm_difference": 1e-4}, [True, True]),
        ("llama/fp32/full/tp2", {"largest_difference": 2e-5, "largest_norm_difference": 2e-3}, [False, False]),
        ("llama/bf16/full/tp2", {"largest_difference": 9e-3, "mean_difference": 1e-3}, [True]),
        ("llama/bf16/full/tp2", {"largest_difference": 9e-3, "mean_difference": float("nan")}, [False]),
    ],
)
def test_verdict_of_losses_when_given_is_by_the_tolerance(
    name: str, figures: dict[str, float], expected: list[bool]
) -> None:
    assert outcomes({f"equality/2/{name}": figures}) == expected


def _measured(**figures: Any) -> dict[str, Any]:
    row = {
        "is_tiny": False, "losses_finite": True, "losses": [1.0], "step_s": 1.0, "predicted_step_s": 1.1,
        "allocated_gib": [10.0, 20.0], "predicted_allocated_gib": 20.2,
        "reserved_gib": [10.0, 22.0], "predicted_reserved_gib": 22.0, "tokens_per_sec_per_gpu": 9500.0,
    }  # fmt: skip
    return {**row, **figures}


def test_verdicts_of_speed_when_all_is_well_pass() -> None:
    rows = {
        "throughput/8/8b-lora-one": _measured(tokens_per_sec_per_gpu=9800.0),
        "throughput/8/8b-lora-ddp8": _measured(),
        "throughput/8/8b-full-fsdp8": _measured(),
        "throughput/8/8b-full-pp4-fsdp2-zbv": _measured(bubble=0.1, predicted_bubble=0.11),
    }
    assert len(outcomes(rows)) == 4 * 2 + 1 + 1 + 1 + 2 * 3
    assert all(outcomes(rows))


@pytest.mark.parametrize(
    ("case", "figures", "failures"),
    [
        ("8b-lora-ddp8", {"tokens_per_sec_per_gpu": 9000.0}, 1),  # of 9,800 on one GPU
        ("8b-full-fsdp8", {"tokens_per_sec_per_gpu": 8999.0}, 1),
        ("8b-lora-tp8", {"step_s": 1.5}, 1),
        ("8b-full-pp4-fsdp2-zbv", {"bubble": 0.2, "predicted_bubble": 0.1}, 1),
        ("8b-lora-tp8", {"predicted_allocated_gib": 18.0}, 2),  # a tenth too low: 95th percentile, and most under
        ("8b-lora-tp8", {"losses_finite": False}, 1),
        ("8b-lora-tp8", {"out_of_memory": "no room"}, 1),
    ],
)
def test_verdicts_of_speed_when_something_is_off_tell(case: str, figures: dict[str, Any], failures: int) -> None:
    rows = {"throughput/8/8b-lora-one": _measured(tokens_per_sec_per_gpu=9800.0), f"throughput/8/{case}": _measured()}
    before = outcomes(rows).count(False)
    rows[f"throughput/8/{case}"] |= figures
    if case == "8b-lora-tp8" and "predicted_allocated_gib" in figures:
        del rows["throughput/8/8b-lora-one"]
        failures += 1  # and the median
    assert outcomes(rows).count(False) - before == failures


def test_verdicts_of_a_killed_worker_when_given_need_a_cause_and_the_same_losses() -> None:
    row: dict[str, Any] = {
        "exit_code": 1, "ended_after_s": 6.0, "cause": "rank 1 was killed by SIGKILL", "left_running": [],
        "largest_difference_before": 0.0, "resumed_at_step": 8, "resumed_steps": STEPS,
        "largest_resumed_difference": 1e-6,
    }  # fmt: skip
    assert all(outcomes({"kill/2": row}))
    bad = {"ended_after_s": 31.0, "cause": "not told", "left_running": [7], "resumed_at_step": 0}
    for key, value in bad.items():
        assert outcomes({"kill/2": {**row, key: value}}).count(False) == 1


_STAND_IN = """
import json, os, sys, time
sys.path.insert(0, {benchmarks!r})
from pathlib import Path
from multi_job import CURRENT, Plan, read, write
from multi_results import Results
plan = Plan(**read(Path(sys.argv[2])))
current = Path(plan.work) / CURRENT
for name in plan.cases if os.environ["RANK"] == "0" else ():
    write(current, dict(case=name, since=time.time()))
    if name == "bad":
        sys.exit(5)
    if name == "slow":
        time.sleep(60)
    Results(Path(plan.results)).put(name, dict(step_s=1.0), plan.call)
    current.unlink()
"""
"""Two ranks, of which the first runs the cases: one fails, one takes too long."""


def _run_stand_in(tmp_path: Path, cases: Sequence[str], budget: float) -> dict[str, dict[str, Any]]:
    script, work = tmp_path / "ranks.py", tmp_path / "work"
    script.write_text(_STAND_IN.format(benchmarks=str(SCRIPT.parent)), encoding="utf-8")
    work.mkdir()
    seconds = dict.fromkeys(cases, 0.1)
    plan = Plan(tuple(cases), str(tmp_path / FILE), str(work), "call", time.time() + budget, seconds)
    run_job(plan, 2, script)
    return rows_of(tmp_path)


def test_job_when_a_case_fails_goes_on_with_the_next(tmp_path: Path) -> None:
    rows = _run_stand_in(tmp_path, ("first", "bad", "last"), budget=30)
    assert rows["first"]["step_s"] == rows["last"]["step_s"] == 1.0
    assert "exit code 5" in rows["bad"]["error"]


def test_job_when_time_is_up_keeps_what_is_done_and_leaves_the_rest(tmp_path: Path) -> None:
    started = time.monotonic()
    rows = _run_stand_in(tmp_path, ("first", "slow", "last"), budget=3)
    assert set(rows) == {"first"}
    assert time.monotonic() - started < 10


@pytest.mark.slow
def test_script_when_run_tiny_on_two_ranks_measures_and_goes_on_where_it_was(tmp_path: Path) -> None:
    cases = "links,llama/fp32/full/tp2-whole,llama/bf16/qlora/zero3,8b-lora-pp2-zbv,30b-8layers-full-ep2$"
    words = ("--tiny", "--gpus", "2", "--only", "links,throughput,equality", "--cases", cases, "--out", tmp_path)
    done = run_script(*words, "--budget", "240")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(tmp_path)
    assert len(rows) == 6 + 2, done.stdout + done.stderr  # and what one process does, in fp32 and with 4 bits
    judged = run_script("--check", "--out", tmp_path)
    assert judged.returncode == 0, judged.stdout
    assert rows["throughput/2/8b-lora-pp2-zbv"]["micro_batches"] == 4
    assert read_hardware(tmp_path / "hardware-2.yaml").per_node == 2
    again = run_script(*words, "--budget", "20")
    assert again.returncode == 0
    assert again.stdout == ""
    assert rows_of(tmp_path) == rows


@pytest.mark.slow
@pytest.mark.grid  # the kills of tests/parallel/test_train_layouts.py are in every run
def test_script_when_a_worker_is_killed_finds_the_same_losses_on_fewer(tmp_path: Path) -> None:
    done = run_script("--tiny", "--gpus", "2", "--only", "kill", "--budget", "170", "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    judged = run_script("--check", "--out", tmp_path)
    assert judged.returncode == 0, judged.stdout
    assert rows_of(tmp_path)["kill/2"]["resumed_ranks"] == 1
