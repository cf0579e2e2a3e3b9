"""Every point of a grid once, also when the study is killed and goes on.

Optuna's ``GridSampler`` numbers the points, in an order that its seed shuffles, and notes the number on a trial. Three
things follow: a trial that was killed counts as done and its point is never evaluated; the same study opened with
another seed evaluates points twice and others never; and the last ``study.tell`` of an ask-and-tell loop raises
``RuntimeError``. Here a point is known by its values, so none of that can be.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import product
from math import prod
from random import Random
from typing import Any

from optuna import Study
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from lightning_bharat.tuning._optuna import FIXED, all_trials, contains, give_up, note
from lightning_bharat.tuning.options import nearest

POINT = "bharat:grid_point"

# A point whose trial is killed again and again is given up: it may be what kills it.
ATTEMPTS = 3

# More points than that are no grid that anybody evaluates.
MOST = 100_000

Point = tuple[Any, ...]


class Grid(BaseSampler):
    """Evaluates each point of a grid once.

    A point is done when a trial with its values is complete or pruned, or failed by itself (its ``end`` says how: an
    infeasible point, no memory, an error). It is evaluated again when its trial was killed, up to three times.

    Args:
        values: for each parameter the values it takes.
        seed: shuffles the order. None: the last parameter changes fastest.

    Raises:
        ValueError: no values, a value that a storage can't keep, or more than 100 000 points.
    """

    def __init__(self, values: Mapping[str, Sequence[Any]], seed: int | None = None) -> None:
        self.values = {name: _checked(name, each) for name, each in values.items()}
        size = prod(map(len, self.values.values()))
        if not self.values or size > MOST:
            counts = " × ".join(f"{name} {len(each)}" for name, each in self.values.items()) or "no parameter"
            raise ValueError(
                f'sampler="grid": {size} points ({counts}); expected 1 to {MOST}. Write fewer values, or '
                'sampler="qmc", which covers a space evenly with as many trials as you give it'
            )
        self._points: list[Point] = list(product(*self.values.values()))
        if seed is not None:
            Random(seed).shuffle(self._points)

    def __len__(self) -> int:
        return len(self._points)

    def is_exhausted(self, study: Study) -> bool:
        """Whether no point is left to hand out: each has a trial that is done or running, and none waits to be retried.
        One that runs may be killed yet, so ask again when all have ended."""
        waits = any(trial.state == TrialState.WAITING for trial in all_trials(study))
        return not waits and not self._owed(study)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Hand the trial a point.

        Raises:
            ValueError: no point is left, or none has what the enqueued trial fixes.
        """
        if self._point_of(trial) is not None:  # enqueued with all of it, or a retry
            return
        fixed = trial.system_attrs.get(FIXED, {})
        owed = [point for point in self._owed(study) if self._fits(point, fixed)]
        if not owed:
            give_up(study, trial)
            with_these = f" with {fixed}" if fixed else ""
            raise ValueError(f"all of the {len(self)} points of the grid{with_these} have a trial: nothing is left")
        # Two controllers of one study that ask at once see the same points owed, but their trials' numbers differ.
        wanted = self._points[trial.number % len(self)]
        point = wanted if wanted in set(owed) else owed[trial.number % len(owed)]
        note(study, trial, POINT, dict(zip(self.values, point, strict=True)))

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Nothing: each parameter is looked up by itself."""
        return {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Nothing, see above."""
        return {}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """The parameter's value at the trial's point.

        Raises:
            ValueError: the grid has no such parameter, or its value is outside of what the trial may take.
        """
        if param_name not in self.values:
            near = nearest(param_name, self.values)
            raise ValueError(f"the grid has no {param_name!r}: it has {', '.join(self.values)}.{near}")
        noted = next(t for t in all_trials(study) if t.number == trial.number).system_attrs[POINT]
        value = noted[param_name]
        if not contains(param_distribution, value):
            raise ValueError(f"the grid has {param_name}={value!r}, and the trial takes {param_distribution}")
        return value

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """End ``study.optimize`` after the last point; who asks and tells looks at :meth:`is_exhausted`."""
        if not self._owed(study, {trial.number: state}):
            with contextlib.suppress(RuntimeError):  # not inside study.optimize
                study.stop()

    def _owed(self, study: Study, told: Mapping[int, TrialState] | None = None) -> list[Point]:
        """Points without a trial, in order. ``told``: states that the storage does not have yet."""
        taken: set[Point] = set()
        killed: Counter[Point] = Counter()
        for trial in all_trials(study):
            point = self._point_of(trial)
            if point is None:
                continue
            if (told or {}).get(trial.number, trial.state) == TrialState.FAIL and _was_killed(trial):
                killed[point] += 1
            else:
                taken.add(point)
        taken |= {point for point, times in killed.items() if times >= ATTEMPTS}
        return [point for point in self._points if point not in taken]

    def _point_of(self, trial: FrozenTrial) -> Point | None:
        known = {**trial.system_attrs.get(POINT, {}), **trial.system_attrs.get(FIXED, {}), **trial.params}
        return tuple(known[name] for name in self.values) if set(self.values) <= set(known) else None

    def _fits(self, point: Point, fixed: Mapping[str, Any]) -> bool:
        return all(fixed.get(name, value) == value for name, value in zip(self.values, point, strict=True))


def grid_of(space: Any) -> dict[str, list[Any]]:
    """The values of each parameter.

    Args:
        space: lists of values or Optuna's distributions by name, or a ``SearchSpace`` (whose ``grid()`` is asked).

    Raises:
        ValueError: a range without steps, or nothing that has values.
    """
    if hasattr(space, "grid"):
        return space.grid()
    if not isinstance(space, Mapping):
        raise ValueError(f'sampler="grid" needs the space: expected a SearchSpace or a dict of values, got {space!r}')
    return {name: _values(name, values) for name, values in space.items()}


def _values(name: str, values: Any) -> list[Any]:
    if isinstance(values, CategoricalDistribution):
        return list(values.choices)
    if isinstance(values, IntDistribution):
        return list(range(values.low, values.high + 1, values.step))
    if isinstance(values, FloatDistribution):
        if values.step is None:
            raise ValueError(
                f'sampler="grid": {name} is a range without steps ({values}). Give it a step, list its values '
                '(choices), or write sampler="qmc"'
            )
        count = round((values.high - values.low) / values.step) + 1
        return [min(values.low + i * values.step, values.high) for i in range(count)]
    return list(values)


def _checked(name: str, values: Sequence[Any]) -> list[Any]:
    for value in values:
        if value is not None and not isinstance(value, (bool, int, float, str)):
            raise ValueError(
                f'sampler="grid": {name} has the value {value!r}; expected numbers, words, true, false or null'
            )
    return list(dict.fromkeys(values))


def _was_killed(trial: FrozenTrial) -> bool:
    """Whether the trial failed by no fault of its point: a trial that says nothing of its end was interrupted."""
    return str(trial.user_attrs.get("end", "killed")).startswith("killed")
