"""What the planner says of the rows of multi_gpu.py: memory of the most loaded rank, time of a step, bubble.

With the link of the catalogue, and with the one that `links` measured, where it has. Nothing is run, so that rows from
a machine with GPUs are predicted anew on any other (`multi_gpu.py --predict`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fourfold.base.errors import PlanError
from fourfold.planning.cost import cut_step
from fourfold.planning.device import Device, Link
from fourfold.planning.hardware import build_cluster, find_device
from fourfold.planning.keeps import Keeps
from fourfold.training.outlook import Outlook
from rehearsed import GIB, Point, described, point_of

STAND_IN = "h100"
"""The card that a run without one is predicted for, so that tiny runs try this out as well."""


def measured_link(links: dict[str, Any] | None) -> float | None:
    """Bytes/s that arrive, from a row of `links`; its latency is mostly that of calls, which are counted apart."""
    if not links or "link_gb_s" not in links:
        return None
    return links["link_gb_s"] * 1e9


def predict(row: dict[str, Any], gpu: str | None, links: dict[str, Any] | None = None) -> dict[str, Any]:
    """Predictions of a row of `throughput`; an `unpredicted` with the reason where there are none.

    Args:
        gpu: name of the card; None for none.
        links: what was measured of the links.
    """
    try:
        card = find_device(gpu or STAND_IN)
        if row.get("host_op_us"):
            card = replace(card, host_op_s=row["host_op_us"] * 1e-6)
        return _predict(row, card, measured_link(links))
    except PlanError as error:
        return {"unpredicted": str(error)}


def outlook_of(point: Point, card: Device, stage: int = 0) -> Outlook:
    """What the planner knows of a point's run.

    Args:
        stage: the rank's place in the pipeline.
    """
    _, shape, job = described(point)
    layout = point.layout
    cluster = build_cluster(card, layout.world_size)
    return Outlook(shape, job, job, layout, cluster, stage).keeping(Keeps(spared=point.spared, unpacked=point.unpacked))


def _predict(row: dict[str, Any], card: Device, link: float | None) -> dict[str, Any]:
    point = point_of(row["fields"])
    outlook = outlook_of(point, card)
    layout, job = point.layout, outlook.job
    memory = outlook.memory(point.recompute, sum(point.sequences))
    cost = outlook.cost(point.recompute, job.micro_batch)
    found = {
        "predicted_allocated_gib": memory.allocated / GIB,
        "predicted_reserved_gib": memory.reserved / GIB,
        "predicted_device_gib": memory.device / GIB,
        "predicted_step_s": cost.step_s,
        "predicted_exposed_s": cost.exposed_s,
    }
    if layout.pp > 1:
        found["predicted_bubble"] = cost.bubble
        found["predicted_micro_batches"] = cut_step(job, layout, job.micro_batch).count
    if link is not None:
        linked = replace(card, link=Link(card.link.kind, link, card.link.latency_s, share=1.0))
        by_link = replace(outlook, cluster=build_cluster(linked, layout.world_size))
        found["predicted_step_s_by_measured_link"] = by_link.cost(point.recompute, job.micro_batch).step_s
    return found
