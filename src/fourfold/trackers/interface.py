"""What a tracker is: a place that a run's figures are written to. One file per tracker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What a tracker may want to know before the first step.

    Attributes:
        output_dir: the run's folder.
        run_name: a name for people.
        max_steps: optimizer steps of the whole run.
        start_step: optimizer steps already done (0 unless resumed); later figures are to be replaced.
        config: the resolved config, flat.
    """

    output_dir: Path
    run_name: str
    max_steps: int
    start_step: int = 0
    config: Mapping[str, Any] = field(default_factory=dict)


class Tracker(Protocol):
    """Receives figures from rank 0. Each file of this folder has `build(info: RunInfo) -> Tracker`."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Figures of one step; training ones have plain names (`loss`), evaluation ones begin with `eval_`."""
        ...

    def finish(self) -> None:
        """Called once, also when the run fails."""
        ...
