"""How a rank ended, and the one error that tells how all of them did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning_bharat.cluster.failure import signal_name


@dataclass
class RankOutcome:
    """One rank's end.

    Attributes:
        rank: its global rank.
        value: what its function returned (``None`` if it did not return).
        error: the type of the exception that ended it, by name, or ``None``.
        message: that exception's text.
        traceback: that exception's traceback as text.
        exit_code: of its process; negative: the signal that ended it; ``None``: it never ended by itself.
        timed_out: whether it was killed because time was up.
        lost: why nothing is known of its end: what is gone that would have told it.
        stacks: the stacks of all its threads when time was up.
        output: what it wrote to stdout and stderr, in order, at its end the traceback.
        seconds: from the start of the job to its end.
    """

    rank: int
    value: Any = None
    error: str | None = None
    message: str = ""
    traceback: str = ""
    exit_code: int | None = None
    timed_out: bool = False
    lost: str = ""
    stacks: str = ""
    output: str = ""
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether its function returned and its process ended with 0."""
        return self.error is None and self.exit_code == 0 and not self.timed_out

    def summary(self) -> str:
        """One line: how it ended."""
        if self.lost:
            return f"rank {self.rank}: {self.lost}"
        if self.timed_out:
            return f"rank {self.rank}: still running after {self.seconds:.1f} s, killed"
        if self.error is not None:
            return f"rank {self.rank}: {self.error}: {self.message}"
        if self.exit_code is not None and self.exit_code < 0:
            return f"rank {self.rank}: ended by {signal_name(-self.exit_code)}"
        if self.exit_code:
            return f"rank {self.rank}: ended with exit code {self.exit_code} and no exception"
        return f"rank {self.rank}: ok"


class RanksFailed(AssertionError):
    """At least one rank of a job failed; the text holds every rank's end, stacks and last output.

    Attributes:
        outcomes: one :class:`RankOutcome` a rank, in order.
    """

    def __init__(self, what: str, outcomes: list[RankOutcome], output_lines: int = 60) -> None:
        self.outcomes = outcomes
        parts = [f"{what}: {sum(not o.ok for o in outcomes)} of {len(outcomes)} ranks failed"]
        parts += [f"  {outcome.summary()}" for outcome in outcomes]
        for outcome in outcomes:
            tail = "\n".join(outcome.output.splitlines()[-output_lines:]) if not outcome.ok else ""
            for title, text in (("stacks", outcome.stacks), ("output", tail)):
                if text:
                    parts.append(f"---- rank {outcome.rank}: {title}\n{text.rstrip()}")
        super().__init__("\n".join(parts))
