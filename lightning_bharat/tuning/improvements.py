"""What the generations of a population have shown: by how much the metric got better in each, and with which values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from optuna import Study
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from lightning_bharat.tuning._optuna import FIXED
from lightning_bharat.tuning.places import GENERATION, PARENT
from lightning_bharat.tuning.space import SearchSpace
from lightning_bharat.tuning.surrogate import Array, to_unit

Numbers = Mapping[str, BaseDistribution]


class NoProposal(ValueError):
    """Nothing can be proposed by what is known, in words."""


def numbers_of(space: SearchSpace, keys: Sequence[str] | None) -> Numbers:
    """Numbers that all points have.

    Args:
        space: what is searched.
        keys: of them; ``None``: all.
    """
    return {
        key: each
        for key, each in space.distributions.items()
        if not isinstance(each, CategoricalDistribution) and not each.single()
        if not space.is_conditional(key) and (keys is None or key in keys)
    }


class Improvements:
    """By how much the metric got better in generations that went on from another one.

    Args:
        study: of the population.
        numbers: parameters that are looked at.
        end: of a generation, in epochs or steps.
    """

    def __init__(self, study: Study, numbers: Numbers, end: Callable[[int], int]) -> None:
        self._sign = 1.0 if study.direction == StudyDirection.MAXIMIZE else -1.0
        self._by_number = {trial.number: trial for trial in study.get_trials(deepcopy=False)}
        self._numbers, self._end = numbers, end

    def begins(self, trial: FrozenTrial) -> tuple[float, float] | None:
        """Time and metric that stand for a trial's generation: its end, and the metric at its beginning, of which more
        is better; ``None``: it is the first of its member."""
        before = self._by_number.get(trial.user_attrs.get(PARENT, -1))
        value = None if before is None else self._value(before)
        return None if value is None else (float(self._end(trial.user_attrs[GENERATION])), value)

    def of(self, trials: Iterable[FrozenTrial]) -> tuple[Array, Array]:
        """Rows of time, metric before and point in the unit cube, in the order of time, and the gain of each.

        A gain is that of an epoch or step. Those farther below the median than the best is above it are as far: a
        generation that blew up says no more than that, and neither does one that failed. Like rows are one, with the
        mean of their gains: a Gaussian process without noise can't have a point twice.
        """
        rows, gains = [], []
        for trial in trials:
            begins, point = self.begins(trial), unit_point(trial, self._numbers)
            if begins is not None and point is not None:
                rows.append([*begins, *point])
                gains.append(self._gain(trial, *begins))
        if not rows or all(math.isnan(gain) for gain in gains):
            return np.zeros((0, 2 + len(self._numbers))), np.zeros(0)
        seen, place = np.unique(rows, axis=0, return_inverse=True)
        counts = np.bincount(place.ravel())
        return seen, np.bincount(place.ravel(), _bounded(np.array(gains))) / counts

    def _gain(self, trial: FrozenTrial, end: float, before: float) -> float:
        """NaN if it failed."""
        value = self._value(trial)
        began = self._end(self._by_number[trial.user_attrs[PARENT]].user_attrs[GENERATION])
        return math.nan if value is None else (value - before) / (end - began)

    def _value(self, trial: FrozenTrial) -> float | None:
        if trial.state != TrialState.COMPLETE or trial.value is None or not math.isfinite(trial.value):
            return None
        return self._sign * trial.value


def unit_point(trial: FrozenTrial, numbers: Numbers) -> Array | None:
    """A trial's numbers in their ranges, 0 to 1, also of one that was not asked for them yet."""
    params: dict[str, Any] = {**trial.system_attrs.get(FIXED, {}), **trial.params}
    if not numbers.keys() <= params.keys():
        return None
    return np.array([to_unit(params[key], distribution) for key, distribution in numbers.items()])


def _bounded(gains: Array) -> Array:
    known = gains[~np.isnan(gains)]
    least = 2 * np.median(known) - known.max()
    return np.where(np.isnan(gains), least, np.maximum(gains, least))
