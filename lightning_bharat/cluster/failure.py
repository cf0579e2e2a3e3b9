"""Why an attempt to run ended: what each rank's end shows, and which of them are but consequences of another's."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_bharat.cluster.heartbeat import NO_STEP

Cause = Literal["exception", "signal", "exit code", "stopped", "hung", "lost connection", "health"]
# By these HealthMonitor asks for a restart: EX_TEMPFAIL of sysexits.h, and an exception of this name.
ASKS, ASKS_BY = 75, "HealthError"


@dataclass(frozen=True)
class RankEnd:
    """How one rank ended, or where it stood when it was found.

    Attributes:
        rank: its global rank.
        exit_code: of its process; negative: the signal that ended it; ``None``: it is still there.
        kind: of the exception that left its script, by name; empty: none did.
        message: that exception's text.
        traceback: as text.
        is_victim: whether the exception is but the consequence of another rank's end.
        step: optimizer steps that it had done; -1: not known.
    """

    rank: int
    exit_code: int | None = None
    kind: str = ""
    message: str = ""
    traceback: str = ""
    is_victim: bool = False
    step: int = NO_STEP


@dataclass(frozen=True)
class Failure:
    """What ended an attempt.

    Attributes:
        cause: in a word.
        ranks: where it began, as far as this host can tell; none: on another host.
        words: in one line.
        step: optimizer steps that were done there; -1: not known.
        report: all that is known, on many lines.
    """

    cause: Cause
    ranks: tuple[int, ...]
    words: str
    step: int = NO_STEP
    report: str = ""

    @property
    def is_of_program(self) -> bool:
        """Whether the script itself said so: then the same is likely to happen again."""
        return self.cause == "exception"

    def is_like(self, other: Failure | None) -> bool:
        """Whether both are the same, at the same step, but for numbers in their words."""
        return other is not None and (self.cause, self.step, _shape(self.words)) == (
            other.cause,
            other.step,
            _shape(other.words),
        )


def of_ends(ends: Sequence[RankEnd]) -> Failure | None:
    """The failure that the ends of an attempt's ranks on this host show; ``None``: none of them failed."""
    failed = [end for end in ends if end.exit_code not in (None, 0)]
    if not failed:
        return None
    culprits = min((_weight(end), end.rank) for end in failed)[0]
    those = [end for end in failed if _weight(end) == culprits]
    first = those[0]
    ranks = () if culprits == _VICTIM else tuple(end.rank for end in those)
    report = "\n".join(end.traceback for end in those[:1] if end.traceback)
    return Failure(_cause(first), ranks, _words(first), first.step, report)


_VICTIM = 4


def _weight(end: RankEnd) -> int:
    """Whose word counts most: a process that was killed can't be wrong; who lost a connection knows of nothing else."""
    assert end.exit_code is not None
    if end.is_victim:
        return _VICTIM
    if end.exit_code < 0:
        return 2 if -end.exit_code == signal.SIGABRT else 0  # NCCL's watchdog aborts the peers of a dead rank
    return 1 if end.kind else 3


def _cause(end: RankEnd) -> Cause:
    assert end.exit_code is not None
    if end.is_victim:
        return "lost connection"
    if end.exit_code < 0:
        return "signal"
    if end.exit_code == ASKS or end.kind == ASKS_BY:
        return "health"
    return "exception" if end.kind else "exit code"


def _words(end: RankEnd) -> str:
    assert end.exit_code is not None
    if end.exit_code < 0:
        name = signal_name(-end.exit_code)
        return f"rank {end.rank} was ended by {name}" + (
            " (the kernel's way when memory runs out, among others)" if name == "SIGKILL" else ""
        )
    if end.kind == "SystemExit":
        return f"rank {end.rank} left with exit code {end.message}"
    if end.kind:
        first_line = end.message.strip().splitlines()[0] if end.message.strip() else ""
        return f"rank {end.rank} raised {end.kind}: {first_line}"
    return f"rank {end.rank} ended with exit code {end.exit_code} and no exception"


def signal_name(number: int) -> str:
    """``"SIGKILL"`` for 9; what has no name keeps its number."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _shape(words: str) -> str:
    return re.sub(r"(0x)?[0-9a-f]*[0-9][0-9a-f]*", "#", words)
