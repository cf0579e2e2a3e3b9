"""Whether a run that failed is started again, and when."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_bharat.cluster.failure import Failure

LONGEST_WAIT = 60.0  # seconds


@dataclass(frozen=True)
class Decision:
    """What is done after a failure.

    Attributes:
        again: whether the run is started again.
        wait: seconds before that.
        why: in words.
    """

    again: bool
    wait: float
    why: str


class RestartPolicy:
    """Starts again at once after a failure; later where restarts bring nothing; not where the program itself fails.

    Args:
        limit: restarts in a row of which none gets beyond the furthest step that was reached before.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._furthest = 0
        self._in_vain = 0
        self._last: Failure | None = None

    def decide(self, failure: Failure, reached: int) -> Decision:
        """After a failure of the last attempt.

        Args:
            reached: optimizer steps that were done by then; -1: not known.
        """
        same, self._last = failure.is_like(self._last), failure
        if reached > self._furthest:
            self._furthest, self._in_vain = reached, 0
        if failure.is_of_program and same:
            where = f"at step {failure.step}" if failure.step >= 0 else "before any step was counted"
            return Decision(False, 0, f"the same exception twice {where}: the program fails, and would fail again")
        if self._in_vain >= self._limit:
            if not self._limit:
                return Decision(False, 0, "--max-restarts 0")
            return Decision(False, 0, f"{self._in_vain} restarts in a row brought no new step (--max-restarts)")
        wait = min(2.0 ** (self._in_vain - 1), LONGEST_WAIT) if self._in_vain else 0.0
        self._in_vain += 1
        return Decision(True, wait, f"restart {self._in_vain} of {self._limit} since the last progress")
