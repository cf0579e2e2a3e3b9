"""Best points of earlier studies as first trials of another one, for as long as they are worth it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from optuna.trial import FrozenTrial

SEED = "bharat:seed"  # attribute of a trial that is one: which
_UNTIL = 10  # trials: what is good is known by then, and no seed is needed


class Seeds:
    """Which of the sources' best points is tried next.

    Args:
        best: of each source, its best trials.
        most: at most so many are tried.
    """

    def __init__(self, best: Sequence[Sequence[FrozenTrial]], most: int) -> None:
        longest = max(map(len, best))
        # The best of each, the second best of each, and so on.
        self._points = [(s, each[i].params) for i in range(longest) for s, each in enumerate(best) if i < len(each)]
        self._most = most

    def params(self, seed: int) -> dict[str, Any]:
        """Of one of them."""
        return dict(self._points[seed][1])

    def next(self, trials: Sequence[FrozenTrial], losses: Mapping[int, float]) -> int | None:
        """The number of the next one; None where it is not the turn of one.

        After the first, a source's are tried only where one is known to be better than half of what others came to, so
        those of a source that has nothing to do with the study cost one trial each.

        Args:
            trials: of the study, that have begun.
            losses: of those that have a result, by their numbers.
        """
        tried = {trial.system_attrs[SEED]: trial.number for trial in trials if SEED in trial.system_attrs}
        if not self._points or len(tried) >= self._most or len(trials) >= _UNTIL:
            return None
        if not tried:
            return 0
        others = [loss for number, loss in losses.items() if number not in tried.values()]
        if not others:
            return None
        for seed, (source, _) in enumerate(self._points):
            before = [losses.get(number) for other, number in tried.items() if self._points[other][0] == source]
            known = [loss for loss in before if loss is not None]
            if seed not in tried and (not before or (known and min(known) < median(others))):
                return seed
        return None
