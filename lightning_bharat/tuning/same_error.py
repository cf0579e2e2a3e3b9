"""Trials that end one after another by the same error: it is the program's, and a search does not get past it."""

from __future__ import annotations

from pathlib import Path

from optuna.trial import TrialState

from lightning_bharat.tuning.verdict import Verdict


class SameError(RuntimeError):
    """Trials one after another ended by the same error: it is the program's, and more would end by it too."""


class ErrorsInARow:
    """Those of the trials that ended last.

    Args:
        most: so many of one kind are too many.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._errors: list[str] = []

    def trial_ended(self, how: Verdict, folder: Path) -> None:
        """Count its error; a trial that did not fail ends the row, and one that was killed does not count.

        Raises:
            SameError: there are too many.
        """
        if how.state != TrialState.FAIL:
            self._errors.clear()
        elif how.error:
            self._errors.append(how.error)
        if self._errors[-self._most :] == [how.error] * self._most:
            raise SameError(
                f"{self._most} trials one after another ended by {how.error}, the last one by {how.end}. "
                f"What it has written is in {folder}"
            )
