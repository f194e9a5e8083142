"""Predicted and measured side by side, at the end of a run: peak memory, and the time of a step."""

from __future__ import annotations

from dataclasses import dataclass

from fourfold.base.errors import PlanError
from fourfold.base.log import get_logger
from fourfold.base.units import GIB
from fourfold.dataset.collate import CutPolicy
from fourfold.parallel.whole import everyone
from fourfold.planning.job import Recompute
from fourfold.training.memory import peak_memory_figures
from fourfold.training.outlook import Outlook
from fourfold.training.step_sizes import StepSizes
from fourfold.training.step_times import StepTimes

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Forecast:
    """What is predicted of the most loaded rank.

    Attributes:
        allocated, reserved: peaks of the allocator, GiB.
        step_s: seconds of an average optimizer step.
    """

    allocated: float
    reserved: float
    step_s: float


def forecast(outlook: Outlook | None, sizes: StepSizes, policy: CutPolicy, recompute: Recompute) -> Forecast | None:
    """What to expect of a run whose steps are settled; None where nothing can be said, which is told.

    Args:
        outlook: None on CPUs, or where the model's shape could not be read.
        policy: how steps are cut.
    """
    if outlook is None:
        return None
    largest = sizes.largest_micro_batch(policy.max_tokens, policy.min_batches)
    try:
        memory, cost = outlook.memory(recompute, largest), outlook.cost(recompute, policy.max_tokens)
    except PlanError as error:
        log.info("Memory and time are not predicted: %s", error)
        return None
    if outlook.job.teacher is not None:
        log.info("The teacher's memory is in the prediction, its time is not.")
    return Forecast(memory.allocated / GIB, memory.reserved / GIB, cost.step_s)


def compare(expected: Forecast | None, times: StepTimes) -> dict[str, float]:
    """Tell what was predicted and what was measured; every rank must call.

    Returns:
        for the results: `predicted_peak_memory_gib`, `predicted_step_s` and `step_s`; nothing without a prediction.
    """
    memory = peak_memory_figures()
    allocated = memory["peak_memory_gib"]
    found: list[tuple[float, float, float | None]] = everyone(
        (allocated, memory.get("reserved_memory_gib", allocated), times.median())
    )
    steps = [step_s for _, _, step_s in found if step_s is not None]
    if expected is None or not steps:
        return {}
    measured = Forecast(max(row[0] for row in found), max(row[1] for row in found), max(steps))
    for line in table(expected, measured):
        log.info("%s", line)
    return {
        "predicted_peak_memory_gib": round(expected.allocated, 4),
        "predicted_step_s": round(expected.step_s, 6),
        "step_s": round(measured.step_s, 6),
    }


def table(expected: Forecast, measured: Forecast) -> list[str]:
    """Lines with a row for each figure, of the most loaded rank."""
    rows = [
        ("peak allocated, GiB", expected.allocated, measured.allocated, 2),
        ("peak reserved, GiB", expected.reserved, measured.reserved, 2),
        ("step, s", expected.step_s, measured.step_s, 4),
    ]
    lines = [f"  {'':<20}{'predicted':>10}{'measured':>10}{'off by':>9}"]
    for name, guess, fact, digits in rows:
        off = f"{guess / fact - 1:+.1%}" if fact > 0 else "-"
        lines.append(f"  {name:<20}{guess:>10.{digits}f}{fact:>10.{digits}f}{off:>9}")
    return lines
