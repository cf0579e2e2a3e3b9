"""A study that begins with given points: a list, a CSV, or the best of an earlier study.

Points are run like any other trial, since a value that was measured elsewhere is none of this study's. So a known value
only says which points are worth it: :class:`~lightning_bharat.tuning.transfer.TransferSampler` learns from all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial

from lightning_bharat.tuning.earlier import EarlierStudy, read_earlier
from lightning_bharat.tuning.points import Point, check_point, fitted, read_csv

Points = Sequence[Mapping[str, Any]] | EarlierStudy


def warm_start(study: optuna.Study, space: Any, points: Points, best: int | None = 5) -> int:
    """Let ``study`` run ``points`` before it asks its sampler. A point that it has had is not run again, so the same
    call may be made each time that a study goes on.

    Args:
        study: to begin.
        space: a ``SearchSpace``, or distributions by dotted keys.
        points: dicts of values by dotted keys; the path of a CSV with such columns and maybe ``value``; an earlier
            study: itself, its folder, or its storage and name. A point may leave keys out: the sampler fills them in.
        best: of points with values (a CSV's column, an earlier study) so many of the best, in their order; all of them
            if None. Points without a value are all taken.

    Returns:
        How many points were new.

    Raises:
        ValueError: a point has an unknown key, or a value of another type or outside of the space: all such are named,
            with file and line, and none is run. Of an earlier study such values are left out, and it is refused if
            nothing is left of its trials.
    """
    if best is not None and best < 1:
        raise ValueError(f"best={best} must be at least 1, or None for all points")
    allowed = distributions_of(space)
    checked = _checked(_read(study, points, allowed, best), allowed)
    before = len(study.get_trials(deepcopy=False))
    for params in checked:
        study.enqueue_trial(params, user_attrs={"warm_start": True}, skip_if_exists=True)
    return len(study.get_trials(deepcopy=False)) - before


def distributions_of(space: Any) -> dict[str, BaseDistribution]:
    """By dotted keys, of a ``SearchSpace`` or a mapping, conditions left out."""
    parameters: Mapping[str, Any] = space if isinstance(space, Mapping) else space.parameters
    return {key: getattr(parameter, "distribution", parameter) for key, parameter in parameters.items()}


def _read(study: optuna.Study, points: Any, space: Mapping[str, BaseDistribution], best: int | None) -> Sequence[Point]:
    if isinstance(points, (str, Path)) and not Path(points).is_dir():
        return _best(study, read_csv(points), best)
    if _is_earlier(points):
        trials = read_earlier(points, "points").best_first[:best]
        found = [_what_fits(trial, space) for trial in trials]
        if not any(point.params for point in found):
            raise ValueError(f"points={points!r}: nothing of its best trials fits into the space {', '.join(space)}")
        return [point for point in found if point.params]
    return [_given(i, point) for i, point in enumerate(points)]


def _given(i: int, point: Any) -> Point:
    if not isinstance(point, Mapping):
        raise ValueError(f"points[{i}]={point!r} is no dict; write values by dotted keys")
    return Point(f"points[{i}]", point)


def _is_earlier(points: Any) -> bool:
    named = isinstance(points, tuple) and len(points) == 2 and isinstance(points[1], str)
    return named or isinstance(points, (str, Path, optuna.Study))


def _best(study: optuna.Study, points: Sequence[Point], best: int | None) -> list[Point]:
    """Points with a value by it, the best first, then those without."""
    sign = -1.0 if study.directions[0] == StudyDirection.MAXIMIZE else 1.0
    known = [(sign * point.value, i) for i, point in enumerate(points) if point.value is not None]
    if known and len(study.directions) > 1:
        raise ValueError(
            f"{points[0].where}: one value does not say what is best in a study of {len(study.directions)} "
            "objectives; leave the column out"
        )
    return [points[i] for _, i in sorted(known)[:best]] + [point for point in points if point.value is None]


def _what_fits(trial: FrozenTrial, space: Mapping[str, BaseDistribution]) -> Point:
    params = {}
    for key in trial.params.keys() & space.keys():
        try:
            params[key] = fitted(trial.params[key], space[key])
        except ValueError:
            continue
    return Point(f"trial {trial.number}", {key: params[key] for key in space if key in params})


def _checked(points: Sequence[Point], space: Mapping[str, BaseDistribution]) -> list[dict[str, Any]]:
    checked, wrong = [], []
    for point in points:
        try:
            checked.append(check_point(point, space))
        except ValueError as error:
            wrong.append(str(error))
    if wrong:
        raise ValueError("\n".join(wrong))
    return checked
