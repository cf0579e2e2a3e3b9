"""The hyperparameters that a trial's weights were trained with, one after another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna import Study

from lightning_bharat.tuning.members import checkpoint_in
from lightning_bharat.tuning.places import GENERATION, MEMBER, PARENT


@dataclass(frozen=True)
class Stage:
    """One generation of a lineage.

    Attributes:
        trial: its number.
        member: whose it was.
        generation: counted from 0.
        params: the values that the weights were trained with in it.
        value: at its end.
    """

    trial: int
    member: int
    generation: int
    params: Mapping[str, Any]
    value: float | None


def lineage(study: Study, trial: int | None = None) -> list[Stage]:
    """The schedule of hyperparameters that led to a trial's weights, from the beginning on.

    Args:
        study: of a population.
        trial: its number; ``None``: the best one.

    Raises:
        ValueError: the trial is none of a population.
    """
    by_number = {each.number: each for each in study.get_trials(deepcopy=False)}
    number: int | None = study.best_trial.number if trial is None else trial
    if number not in by_number or MEMBER not in by_number[number].user_attrs:
        raise ValueError(f"trial={number}: there is no such trial of a population in this study")
    stages: list[Stage] = []
    while number is not None:
        one = by_number[number]
        place = one.user_attrs[MEMBER], one.user_attrs[GENERATION]
        stages.insert(0, Stage(number, *place, one.params, one.value))
        number = one.user_attrs.get(PARENT)
    return stages


def in_words(study: Study, folder: Path) -> str:
    """One line for a person: where the best trial's weights are, and its lineage with the values that changed in it.

    Args:
        study: of a population.
        folder: the study's.
    """
    try:
        stages = lineage(study)
    except ValueError:  # none is complete, or none keeps its limits
        return "lineage: there is no best trial"
    told: list[str] = []
    before: Mapping[str, Any] = {}
    for stage in stages:
        changed = {key: value for key, value in stage.params.items() if before.get(key) != value}
        values = ", ".join(f"{key}={_short(value)}" for key, value in changed.items())
        told.append(f"trial {stage.trial}" + (f" ({values})" if values else ""))
        before = stage.params
    return f"its weights: {checkpoint_in(folder, stages[-1].trial)}, by {' -> '.join(told)}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
