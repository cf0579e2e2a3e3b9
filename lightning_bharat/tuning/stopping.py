"""When a study has had enough. Rules read the study alone, so that they hold across restarts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Protocol

from optuna import Study
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from lightning_bharat.tuning.limits import quantity
from lightning_bharat.tuning.memory_of_failures import violation
from lightning_bharat.tuning.options import check, named


class Rule(Protocol):
    """Says why a study should end."""

    def reason(self, study: Study) -> str | None:
        """One sentence, or None to go on."""


@dataclass(frozen=True)
class NoImprovement:
    """No better trial among the last ones that ended.

    Trials that completed or were pruned count; failed ones say nothing about progress. A trial that breaks a limit is
    no better one. With several objectives a trial is better when no earlier one is at least as good in all of them.

    Args:
        trials: how many in a row.
        min_delta: what counts as better, in the metric's unit; for one objective.
    """

    trials: int
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        if self.trials < 1 or self.min_delta < 0:
            raise ValueError(f"{self}: expected at least one trial and a min_delta of 0 or more")

    def reason(self, study: Study) -> str | None:
        """See :class:`Rule`.

        Raises:
            ValueError: ``min_delta`` with several objectives.
        """
        if self.min_delta and len(study.directions) > 1:
            raise ValueError(f"{self}: min_delta has no meaning for {len(study.directions)} objectives: leave it out")
        signs = [-1.0 if direction == StudyDirection.MAXIMIZE else 1.0 for direction in study.directions]
        ended = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
        best: list[list[float]] = []
        last, since = None, 0
        for trial in sorted(ended, key=lambda trial: (_end(trial), trial.number)):
            since += 1
            if trial.state == TrialState.PRUNED or violation(trial):
                continue
            losses = [sign * value for sign, value in zip(signs, trial.values, strict=True)]
            if not any(self._as_good(other, losses) for other in best):
                best.append(losses)
                last, since = trial.number, 0
        if since < self.trials:
            return None
        return f"none of the last {since} trials was better than " + (f"trial {last}" if best else "nothing at all")

    def _as_good(self, one: Sequence[float], other: Sequence[float]) -> bool:
        return all(a - self.min_delta <= b for a, b in zip(one, other, strict=True))


@dataclass(frozen=True)
class TimeLimit:
    """Enough time in which a trial ran.

    Time in which no trial runs, as between a kill and the next start, does not count, and two trials at once count
    once. Of a killed trial what it says itself counts (``seconds``), since nobody saw when it ended.

    Args:
        seconds: of the whole study, or a number with a unit: ``"8 h"``.
    """

    seconds: float | str

    def __post_init__(self) -> None:
        if quantity(self.seconds) <= 0:
            raise ValueError(f"{self}: expected more than 0 seconds")

    def reason(self, study: Study) -> str | None:
        """See :class:`Rule`."""
        ran, limit = time_running(study.get_trials(deepcopy=False)), quantity(self.seconds)
        return f"trials ran for {ran:.0f} s, of {limit:.0f} s allowed" if ran >= limit else None


@dataclass(frozen=True)
class TokenLimit:
    """Enough tokens, over all trials: complete, pruned and failed ones.

    Args:
        tokens: the most, as counted by the trials (user attribute ``tokens``).
    """

    tokens: float

    def __post_init__(self) -> None:
        if self.tokens <= 0:
            raise ValueError(f"{self}: expected more than 0 tokens")

    def reason(self, study: Study) -> str | None:
        """See :class:`Rule`.

        Raises:
            ValueError: a trial completed without counting tokens, so the limit would never be reached.
        """
        trials = study.get_trials(deepcopy=False)
        for trial in trials:
            if trial.state == TrialState.COMPLETE and trial.user_attrs.get("tokens") is None:
                raise ValueError(f"{self}: trial {trial.number} counted no tokens: write TimeLimit instead")
        seen = sum(trial.user_attrs.get("tokens") or 0 for trial in trials)
        return f"trials saw {seen} tokens, of {self.tokens:.0f} allowed" if seen >= self.tokens else None


RULES: dict[str, Callable[..., Rule]] = {
    "no_improvement": NoImprovement,
    "time": TimeLimit,
    "tokens": TokenLimit,
}


def make_rules(rules: Rule | Mapping[str, Any] | Sequence[Any] | None) -> list[Rule]:
    """Rules by name.

    Args:
        rules: a rule, a dict of its name and arguments (``{"name": "no_improvement", "trials": 20}``), a list of
            either, or None.

    Raises:
        TypeError: something else.
        ValueError: an unknown name or argument, or a missing one.
    """
    if rules is None:
        return []
    if isinstance(rules, Sequence) and not isinstance(rules, str):
        return [rule for each in rules for rule in make_rules(each)]
    if hasattr(rules, "reason"):
        return [rules]
    name, options = named("stop", rules, RULES)
    check("stop", name, RULES[name], options, ())
    return [RULES[name](**options)]


def why_stop(study: Study, rules: Sequence[Rule]) -> str | None:
    """The first rule's reason to end the study, or that its sampler has no point left; None to go on."""
    exhausted = getattr(study.sampler, "is_exhausted", None)
    if exhausted is not None and exhausted(study):
        return "each point of the grid has a trial"
    return next((reason for rule in rules if (reason := rule.reason(study))), None)


def time_running(trials: Sequence[FrozenTrial], now: datetime | None = None) -> float:
    """Seconds in which at least one of ``trials`` ran."""
    now = now or datetime.fromtimestamp(time.time())
    spans = sorted((trial.datetime_start, _end(trial, now)) for trial in trials if trial.datetime_start is not None)
    total, until = timedelta(), datetime.min
    for start, end in spans:
        total += max(end - max(start, until), timedelta())
        until = max(until, end)
    return total.total_seconds()


def _end(trial: FrozenTrial, now: datetime = datetime.max) -> datetime:
    start, end = trial.datetime_start or datetime.min, trial.datetime_complete or now
    if str(trial.user_attrs.get("end", "")).startswith("killed"):
        return min(end, start + timedelta(seconds=trial.user_attrs.get("seconds") or 0.0))
    return end
