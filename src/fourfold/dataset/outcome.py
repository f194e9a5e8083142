"""What became of the rows of a run's data sets, told to the user."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fourfold.base.log import get_logger
from fourfold.dataset.encode import EncodeSettings
from fourfold.dataset.set_stats import SetStats
from fourfold.dataset.tokenise import BROKEN_TURNS, NOTHING_TRAINED, SAME_ANSWERS, ChunkResult

log = get_logger(__name__)
LEFT_OUT = (
    "dataset %s: %s answers that are left out, since stage pt trains on the prompt column alone. Use stage: sft, or "
    "write prompt and answer into one column."
)


class Outcome:
    """Sums up the results of chunks.

    Attributes:
        stats: counts by name of the data set.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = list(names)
        self._complaints: dict[str, str] = {}
        self.stats = {name: SetStats() for name in names}

    def add(self, result: ChunkResult) -> None:
        """Add a chunk; call it in the order of the rows."""
        self._complaints = result.complaints | self._complaints
        for number, counted in result.stats.items():
            self.stats[self._names[number]].add(counted)

    def announce(self, purpose: str) -> None:
        """Log the counts and the first row of each kind that was dropped; `purpose` is what the data is for."""
        announce(self.stats, purpose)
        for reason, complaint in self._complaints.items():
            log.warning("First row dropped (%s): %s", reason, complaint)

    def nothing_left(self, settings: EncodeSettings) -> str:
        """The message for data of which nothing can be trained."""
        rows = sum(stats.rows for stats in self.stats.values())
        tokens = sum(stats.tokens for stats in self.stats.values())
        if settings.kind == "text" and settings.packing and tokens:
            return (
                f"cutoff_len: the {rows} rows hold {tokens} tokens, too few for one block of {settings.cutoff_len}. "
                "Lower cutoff_len, add text, or set `packing: false`."
            )
        reasons: dict[str, int] = {}
        for stats in self.stats.values():
            for reason, number in stats.dropped.items():
                reasons[reason] = reasons.get(reason, 0) + number
        counts = ", ".join(f"{number} have {reason}" for reason, number in reasons.items())
        first = next(iter(self._complaints.values()), "")
        advice = " ".join(_advice(reason, settings) for reason in reasons)
        return (
            f"dataset: none of the {rows} rows of {', '.join(self.stats)} can be trained: {counts}. First: "
            f"{first.removesuffix('.')}. {advice}"
        )


def announce(counted: Mapping[str, SetStats], purpose: str) -> None:
    """Log what became of the rows of each data set, with a warning for those that were dropped."""
    for name, stats in counted.items():
        log.info(
            "dataset %s (%s): %d of %d rows, %d tokens, %d of them trained, %d rows truncated",
            name,
            purpose,
            stats.samples,
            stats.rows,
            stats.tokens,
            stats.targets,
            stats.truncated,
        )
        if stats.partial:
            log.warning(LEFT_OUT, name, f"{stats.partial} rows have")
        for reason, number in stats.dropped.items():
            log.warning("dataset %s: %d rows dropped (%s)", name, number, reason)


def _advice(reason: str, settings: EncodeSettings) -> str:
    """What to do about rows that were dropped for a reason."""
    if reason == NOTHING_TRAINED:
        return f"Raise cutoff_len ({settings.cutoff_len}), or see that the rows have answers."
    if reason == SAME_ANSWERS:
        return f"Raise cutoff_len ({settings.cutoff_len}) if the answers differ further on, or correct the rows."
    if reason == BROKEN_TURNS:
        return "See that user and assistant take turns, and that the entry's tags name them."
    return "Correct the rows, or the columns of their entry."
