"""Trials that failed because they broke a limit, as a sampler can learn from them.

A trial that ran out of memory is a failed one, and Optuna's samplers read no failed trials: they go back to the same
region until the study ends. Here the trial stays failed in the storage, with its cause, and the sampler is shown it as
one that ended and broke its constraint (``limits.py`` sets it), which is what is known of it.

CMA-ES reads no constraints at all. It ranks points and uses nothing but the ranks, so it is shown those that break a
limit as worse than all others, the more the further they break it (Deb's rules, An efficient constraint handling method
for genetic algorithms, 2000).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any, cast

from optuna import Study
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from lightning_bharat.tuning._optuna import CONSTRAINT, StudyView, sampled_trials

_ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


def remembered(study: Study, ranked: bool = False) -> Study:
    """The study as a sampler should see it: itself, as long as no trial has a constraint.

    Args:
        study: the study, or what Hyperband shows in its place.
        ranked: for a sampler that reads values alone: worsen those of trials that break a limit.
    """
    trials = sampled_trials(study)
    constraints = {trial.number: trial.constraints for trial in trials if trial.state in _ENDED}
    names = sorted({name for each in constraints.values() for name in each})
    if not names:
        return study
    typical = {name: _typical(constraints.values(), name) for name in names}
    values = _worst_values(study, trials)
    seen = []
    for trial in trials:
        own = constraints.get(trial.number, {})
        broken = any(value > 0 for value in own.values())
        if trial.state in (TrialState.COMPLETE, TrialState.PRUNED) or (trial.state == TrialState.FAIL and broken):
            # The Gaussian process reads constraints by position: each trial has all of them, in one order.
            trial = _ended(trial, {name: own.get(name, typical[name]) for name in names}, values)
        seen.append(trial)
    return cast(Study, StudyView(study, _ranked(study, seen) if ranked else seen))


def violation(trial: FrozenTrial) -> float:
    """By how much the trial breaks its limits, all together; 0 when it keeps them."""
    return sum(value for value in trial.constraints.values() if value > 0)


def _ended(trial: FrozenTrial, constraints: Mapping[str, float], values: Sequence[float]) -> FrozenTrial:
    seen = copy.copy(trial)
    seen.system_attrs = {key: value for key, value in trial.system_attrs.items() if not key.startswith(CONSTRAINT)}
    for name, value in constraints.items():
        seen.set_constraint(name, value)
    if trial.state == TrialState.FAIL:
        seen.state, seen.values = TrialState.COMPLETE, list(values)
    return seen


def _typical(constraints: Iterable[Mapping[str, float]], name: str) -> float:
    """What a trial that was not measured is taken to have: it ended well, so at most 0."""
    known = [each[name] for each in constraints if name in each]
    return min(median(known), -max(map(abs, known))) if name == "out_of_memory" else min(median(known), 0.0)


def _worst_values(study: Study, trials: Sequence[FrozenTrial]) -> list[float]:
    """What a trial without a result is taken to have, as in SMAC: with the worst, a Gaussian process left the region
    after half as many failures as with the median."""
    complete = [trial.values for trial in trials if trial.state == TrialState.COMPLETE]
    worst = [max if direction == StudyDirection.MINIMIZE else min for direction in study.directions]
    return [of(column) for of, column in zip(worst, zip(*complete, strict=True), strict=False)] or [0.0] * len(worst)


def _ranked(study: Study, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    good = [trial.values[0] for trial in trials if trial.state == TrialState.COMPLETE and not violation(trial)]
    sign = -1.0 if study.direction == StudyDirection.MAXIMIZE else 1.0
    worst = max((sign * value for value in good), default=0.0)
    seen: list[Any] = []
    for trial in trials:
        if trial.state == TrialState.COMPLETE and violation(trial):
            trial = copy.copy(trial)
            trial.values = [sign * (worst + (1 + abs(worst)) * violation(trial))]
        seen.append(trial)
    return seen
