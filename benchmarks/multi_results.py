"""The file of multi_gpu.py's rows: written after every case, so that a call that is killed loses the case it was in."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = "multi_gpu.json"
FAILURES = ("error", "out_of_memory")
"""Keys of rows that have no figures."""


@dataclass(frozen=True, slots=True)
class Results:
    """Rows by name, and the calls that made them; a row's `call` names its call.

    Attributes:
        file: read and replaced as a whole; of the processes of a call only one at a time writes.
    """

    file: Path

    def read(self) -> dict[str, Any]:
        """The whole file."""
        if not self.file.exists():
            return {"format_version": 1, "calls": {}, "rows": {}}
        return json.loads(self.file.read_text(encoding="utf-8"))

    def rows(self) -> dict[str, dict[str, Any]]:
        """All rows."""
        return self.read()["rows"]

    def done(self, *, failed_too: bool) -> set[str]:
        """Names of what need not be run.

        Args:
            failed_too: whether what has failed counts.
        """
        return {name for name, row in self.rows().items() if failed_too or not is_failure(row)}

    def put(self, name: str, row: dict[str, Any], call: str) -> None:
        """Write a row, in the place of an earlier one."""
        found = self.read()
        found["rows"][name] = {**row, "call": call}
        self._write(found)

    def begin_call(self, facts: dict[str, Any]) -> str:
        """Note a call and its machine; returns its name."""
        found = self.read()
        call = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime())
        found["calls"][call] = facts
        self._write(found)
        return call

    def take_in(self, known: Path) -> None:
        """Add the rows of an earlier file, but of those that are here already."""
        earlier, found = json.loads(known.read_text(encoding="utf-8")), self.read()
        for key in ("calls", "rows"):
            found[key] = {**earlier[key], **found[key]}
        self._write(found)

    def gpu_of(self, row: dict[str, Any]) -> str | None:
        """The card that a row was measured on; None for a CPU."""
        return self.read()["calls"].get(row.get("call", ""), {}).get("gpu")

    def _write(self, found: dict[str, Any]) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps(found, indent=1), encoding="utf-8")
        part.replace(self.file)


def is_failure(row: dict[str, Any]) -> bool:
    """Whether a case did not end as it should."""
    return any(key in row for key in FAILURES)


def line_of(name: str, row: dict[str, Any]) -> str:
    """A row for people."""
    if is_failure(row):
        reason = next(str(row[key]) for key in FAILURES if key in row)
        return f"{name:58} failed: {(reason.splitlines() or ['?'])[-1][:300]}"
    parts = []
    for key, form in _SHOWN.items():
        value = row.get(key)
        if isinstance(value, list) and value:
            value = max(value)
        if isinstance(value, bool | int | float | str) and value != "":
            parts.append(f"{key} {value:{form}}" if isinstance(value, float | int) else f"{key} {value}")
    return f"{name:58} " + "  ".join(parts)


_SHOWN = {
    "largest_difference": ".2g", "mean_difference": ".2g", "largest_norm_difference": ".2g",
    "tokens_per_sec_per_gpu": ",.0f", "step_s": ".4f", "predicted_step_s": ".4f",
    "allocated_gib": ".2f", "predicted_allocated_gib": ".2f", "reserved_gib": ".2f", "predicted_reserved_gib": ".2f",
    "bubble": ".3f", "predicted_bubble": ".3f", "link_gb_s": ".4g", "latency_us": ".1f",
    "ended_after_s": ".1f", "cause": "", "largest_resumed_difference": ".2g", "seconds": ".1f",
}  # fmt: skip
"""Figures of a printed row, of lists the largest."""
