"""A study that begins with given points: a list, a CSV, or the best of an earlier study.

Points are run like any other trial, since a value that was measured elsewhere is none of this study's. So a known value
only says which points are worth it: :class:`~lightning_bharat.tuning.transfer.TransferSampler` learns from all of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial

from lightning_bharat.tuning.earlier import EarlierStudy, read_earlier
from lightning_bharat.tuning.points import Point, check_point, fitted, read_csv
from lightning_bharat.tuning.retry import POINT
from lightning_bharat.tuning.space import SearchSpace

Space = SearchSpace | Mapping[str, BaseDistribution]
Points = Sequence[Mapping[str, Any]] | EarlierStudy


def warm_start(study: optuna.Study, space: Space, points: Points, best: int | None = 5) -> int:
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
    return enqueue(study, checked_points(points, space, study.directions, best))


def checked_points(
    points: Points, space: Space | None, directions: Sequence[StudyDirection], best: int | None = 5
) -> list[dict[str, Any]]:
    """``points`` as Optuna takes them; see :func:`warm_start`.

    Args:
        points: as there.
        space: as there; ``None`` for an objective, whose parameters nobody knows before it has run: it takes dicts
            alone, and Optuna warns of a value that does not fit when it is asked for.
        directions: the study's.
        best: as there.

    Raises:
        ValueError: as there.
    """
    if best is not None and best < 1:
        raise ValueError(f"best={best} must be at least 1, or None for all points")
    if space is not None:
        return _checked(_read(points, _distributions(space), directions, best), space)
    return [dict(point.params) for point in _read_untyped(points)]


def enqueue(study: optuna.Study, points: Sequence[Mapping[str, Any]]) -> int:
    """Let ``study`` run ``points`` that it has not had; returns how many."""
    before = len(study.get_trials(deepcopy=False))
    for params in points:
        # The text tells 1 from True, and two hosts that begin at once each other's points: see `retry.withdraw`.
        noted = {POINT: json.dumps(params, sort_keys=True)}
        study.enqueue_trial(dict(params), user_attrs=noted, skip_if_exists=True)
    return len(study.get_trials(deepcopy=False)) - before


def _distributions(space: Space) -> dict[str, BaseDistribution]:
    return dict(space if isinstance(space, Mapping) else space.distributions)


def _read(
    points: Any, space: Mapping[str, BaseDistribution], directions: Sequence[StudyDirection], best: int | None
) -> Sequence[Point]:
    if isinstance(points, (str, Path)) and not Path(points).is_dir():
        return _best(read_csv(points), directions, best)
    if _is_earlier(points):
        trials = read_earlier(points, "points").best_first[:best]
        found = [_what_fits(trial, space) for trial in trials]
        if not any(point.params for point in found):
            raise ValueError(f"points={points!r}: nothing of its best trials fits into the space {', '.join(space)}")
        return [point for point in found if point.params]
    return [_given(i, point) for i, point in enumerate(points)]


def _read_untyped(points: Any) -> list[Point]:
    if isinstance(points, (str, Path)) or _is_earlier(points):
        raise ValueError(
            f"points={points!r}: an objective's parameters have no types before it has run; write a list of dicts"
        )
    return [_given(i, point) for i, point in enumerate(points)]


def _given(i: int, point: Any) -> Point:
    if not isinstance(point, Mapping):
        raise ValueError(f"points[{i}]={point!r} is no dict; write values by dotted keys")
    return Point(f"points[{i}]", point)


def _is_earlier(points: Any) -> bool:
    named = isinstance(points, tuple) and len(points) == 2 and isinstance(points[1], str)
    return named or isinstance(points, (str, Path, optuna.Study))


def _best(points: Sequence[Point], directions: Sequence[StudyDirection], best: int | None) -> list[Point]:
    """Points with a value by it, the best first, then those without."""
    sign = -1.0 if directions[0] == StudyDirection.MAXIMIZE else 1.0
    known = [(sign * point.value, i) for i, point in enumerate(points) if point.value is not None]
    if known and len(directions) > 1:
        raise ValueError(
            f"{points[0].where}: one value does not say what is best in a study of {len(directions)} "
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


def _checked(points: Sequence[Point], space: Space) -> list[dict[str, Any]]:
    allowed, checked, wrong = _distributions(space), [], []
    for point in points:
        try:
            params = check_point(point, allowed)
        except ValueError as error:
            wrong.append(str(error))
            continue
        if isinstance(space, SearchSpace) and (broken := space.violated(params)):
            wrong.append(f"{point.where}: it breaks the constraint {broken}")
        checked.append(params)
    if wrong:
        raise ValueError("\n".join(wrong))
    return checked
