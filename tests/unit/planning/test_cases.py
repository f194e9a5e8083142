"""The four cases, and what each axis would do."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fourfold.config.parallel import ParallelConfig
from fourfold.planning.cases import Cases, answer_cases, sizes_of
from fourfold.planning.hardware import build_cluster
from fourfold.planning.job import Job
from fourfold.planning.search import search
from fourfold.planning.shape import ModelShape
from fourfold.planning.wishes import Wishes

ShapeOf = Callable[[str], ModelShape]

FULL = Job(tuning="full", sequence=4096, micro_batch=4096, sequences_per_step=1024)


def _answers(
    shape: ModelShape, gpu: str, gpus: int, nodes: int = 1, job: Job = FULL, wishes: Wishes | None = None
) -> Cases:
    return answer_cases(search(shape, job, build_cluster(gpu, gpus, nodes), wishes, rescue=False))


@pytest.mark.parametrize(
    ("name", "gpu", "gpus", "nodes", "holds"),
    [
        ("SmolLM2-135M", "rtx4090", 1, 1, (True, False, False, False)),
        ("Llama-3-8B", "h100", 8, 1, (False, True, False, False)),
        ("one-huge-matrix", "h100", 8, 1, (False, False, True, False)),
        ("Llama-3.1-405B", "h100", 8, 64, (False, True, False, True)),
    ],
)
def test_cases_when_asked_of_known_models_are_as_known(
    name: str, gpu: str, gpus: int, nodes: int, holds: tuple[bool, ...], shape_of: ShapeOf
) -> None:
    assert tuple(case.holds for case in _answers(shape_of(name), gpu, gpus, nodes).cases) == holds


def test_sizes_when_computed_by_hand_agree(shape_of: ShapeOf) -> None:
    shape = shape_of("Llama-3-8B")
    sizes = sizes_of(search(shape, FULL, build_cluster("h100", 8)))
    assert sizes.state == 16 * 8_030_261_248  # fp32 weight, gradient and two moments
    assert sizes.layer == 4 * 218_112_000  # a layer's weights and their gradient in bf16
    assert sizes.matrix == 2 * 128_256 * 4096


def _words(cases: Cases) -> dict[str, str]:
    assert all("\n" not in verdict.reason and verdict.reason for verdict in cases.verdicts)
    return {verdict.axis: verdict.word for verdict in cases.verdicts}


def test_verdicts_when_there_is_one_gpu_split_nothing(shape_of: ShapeOf) -> None:
    words = _words(_answers(shape_of("SmolLM2-135M"), "h100", 1))
    assert words == {**dict.fromkeys(("DP", "FSDP/ZeRO", "TP", "PP", "CP"), "pointless"), "EP": "impossible"}


def test_verdicts_when_the_whole_fits_recommend_replicas(shape_of: ShapeOf) -> None:
    words = _words(_answers(shape_of("SmolLM2-135M"), "h100", 8))
    assert (words["DP"], words["FSDP/ZeRO"], words["TP"]) == ("recommended", "pointless", "impossible")
    assert words["PP"] == "pointless"


def test_verdicts_when_the_layer_fits_recommend_shards(shape_of: ShapeOf) -> None:
    found = _answers(shape_of("Llama-3-8B"), "h100", 8)
    words = _words(found)
    assert (words["DP"], words["FSDP/ZeRO"], words["CP"]) == ("possible", "recommended", "pointless")
    assert "0.8 GiB with its gradient" in next(v.reason for v in found.verdicts if v.axis == "FSDP/ZeRO")


def test_verdicts_when_a_layer_is_too_large_leave_only_tp(shape_of: ShapeOf) -> None:
    words = _words(_answers(shape_of("one-huge-matrix"), "h100", 8, job=Job(sequence=4096, micro_batch=4096)))
    assert (words["FSDP/ZeRO"], words["PP"]) == ("impossible", "pointless")
    assert words["TP"] == "recommended"


def test_verdicts_when_the_model_is_of_experts_share_them(shape_of: ShapeOf) -> None:
    assert _words(_answers(shape_of("Qwen3-30B-A3B"), "h100", 8, 4))["EP"] == "recommended"


def test_verdicts_when_a_strategy_is_named_say_so(shape_of: ShapeOf) -> None:
    found = _answers(shape_of("Llama-3-8B"), "h100", 8, wishes=Wishes(ParallelConfig(strategy="fsdp")))
    reasons = {verdict.axis: verdict.reason for verdict in found.verdicts}
    assert reasons["TP"] == "left out, since the config says strategy: fsdp"
