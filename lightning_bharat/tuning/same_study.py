"""A study goes on as it was begun: values of another metric, or another order of them, can't stand beside its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from optuna import Study
from optuna.study import StudyDirection

from lightning_bharat.commands.project import BadInput
from lightning_bharat.tuning.population import Population

ASKED = "asked"  # in the study: how it was asked for


def agree(study: Study, directions: Sequence[str], monitors: Sequence[str], population: Population | None) -> None:
    """Note in a new study how it was asked for, and see that one that goes on is asked for alike.

    A study that Optuna made by itself says in which directions, and no more.

    Args:
        study: a new one, or one that goes on; Optuna gives the latter its old directions without a word.
        directions: that were asked for, as Optuna writes them.
        monitors: metrics that are a trial's values; of an objective none.
        population: how its population is trained.

    Raises:
        BadInput: it was made otherwise.
    """
    now: dict[str, Any] = {"monitor": list(monitors), "population": None if population is None else _stored(population)}
    before = study.user_attrs.get(ASKED)
    is_new = before is None and not study.get_trials(deepcopy=False)
    if before is None:
        before = now if is_new else {**now, "population": None}
    if before["population"] is not None:  # options that there were not yet when it began have their defaults
        before = {**before, "population": _stored(Population(**before["population"]))}
    _compare(
        study, "mode", list(map(_mode, study.directions)), [_mode(StudyDirection[one.upper()]) for one in directions]
    )
    for what, value in now.items():
        _compare(study, what, before[what], value)
    if is_new:
        study.set_user_attr(ASKED, now)


def _compare(study: Study, what: str, before: Any, now: Any) -> None:
    if before != now:
        raise BadInput(
            f"the study {study.study_name!r} has {what}={before}, and this call {what}={now}: write the same to go on "
            "with it, or another --study_name to begin a new one"
        )


def _mode(direction: StudyDirection) -> str:
    return "max" if direction == StudyDirection.MAXIMIZE else "min"


def _stored(population: Population) -> dict[str, Any]:
    """As it comes back from a storage."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(population).items()}
