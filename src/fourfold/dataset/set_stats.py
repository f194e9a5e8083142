"""What became of the rows of a data set, in numbers."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class SetStats:
    """What became of the rows of one data set.

    Attributes:
        rows: rows read.
        samples: of them, those that can be trained.
        tokens: tokens of these samples.
        targets: trained positions of these samples.
        truncated: samples that were cut to fit the cutoff.
        partial: rows of which an answer is left out, since the stage trains on plain text.
        dropped: rows left out, by reason.
    """

    rows: int = 0
    samples: int = 0
    tokens: int = 0
    targets: int = 0
    truncated: int = 0
    partial: int = 0
    dropped: dict[str, int] = field(default_factory=dict)

    def drop(self, reason: str, number: int = 1) -> None:
        """Count rows that are left out."""
        self.dropped[reason] = self.dropped.get(reason, 0) + number

    def add(self, other: SetStats) -> None:
        """Add what `other` counted."""
        self.rows += other.rows
        self.samples += other.samples
        self.tokens += other.tokens
        self.targets += other.targets
        self.truncated += other.truncated
        self.partial += other.partial
        for reason, number in other.dropped.items():
            self.drop(reason, number)
