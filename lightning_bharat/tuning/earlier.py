"""Earlier studies, as warm start and transfer read them: finished trials with their values, the lowest the best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from lightning_bharat.tuning._optuna import all_trials
from lightning_bharat.tuning.errors import StorageError
from lightning_bharat.tuning.storage import open_storage

EarlierStudy = optuna.Study | str | Path | tuple[str | BaseStorage, str]


@dataclass(frozen=True)
class Earlier:
    """What an earlier study found.

    Attributes:
        name: the study's.
        trials: that are complete, finite and feasible.
        losses: of each; the study's values, turned around where the highest was the best.
        direction: of its values.
        began: when its first trial did.
    """

    name: str
    trials: Sequence[FrozenTrial]
    losses: Sequence[float]
    direction: StudyDirection
    began: datetime | None

    @property
    def best_first(self) -> list[FrozenTrial]:
        """The trials by their losses."""
        order = sorted(range(len(self.trials)), key=lambda i: self.losses[i])
        return [self.trials[i] for i in order]

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Of each parameter, as the last trial with it had it."""
        return {name: dist for trial in self.trials for name, dist in trial.distributions.items()}


def read_earlier(source: EarlierStudy, argument: str) -> Earlier:
    """The finished trials of ``source``.

    Args:
        source: a study; the folder of one; or its storage (as :func:`open_storage` takes it, or Optuna's) and its name.
        argument: what the user calls it, for errors.

    Raises:
        StorageError: there is no such storage, or it can't be opened.
        ValueError: the study can't be found, has several objectives, or has no finished trial.
    """
    study = _opened(source, argument)
    if len(study.directions) != 1:
        raise ValueError(
            f"{argument}: the study {study.study_name!r} has {len(study.directions)} objectives, so no trial of it is "
            "the best; write a study with one"
        )
    trials = usable_trials(study)
    if not trials:
        raise ValueError(f"{argument}: the study {study.study_name!r} has no complete trial; leave it out")
    return Earlier(study.study_name, trials, losses_of(study, trials), study.direction, began(study))


def began(study: optuna.Study) -> datetime | None:
    """When the first trial of ``study`` did, to tell it from others of its name."""
    return min((trial.datetime_start for trial in all_trials(study) if trial.datetime_start), default=None)


def usable_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Those whose value says how good their parameters are: complete, finite and feasible."""
    return [trial for trial in all_trials(study) if _is_usable(trial)]


def losses_of(study: optuna.Study, trials: Sequence[FrozenTrial]) -> list[float]:
    """Values of complete trials of a study with one objective, the lowest the best."""
    sign = -1.0 if study.direction == StudyDirection.MAXIMIZE else 1.0
    return [sign * trial.value for trial in trials if trial.value is not None]


def _is_usable(trial: FrozenTrial) -> bool:
    if trial.state != TrialState.COMPLETE or not trial.params:
        return False
    feasible = all(value <= 0 for value in trial.constraints.values())
    return feasible and trial.value is not None and math.isfinite(trial.value)


def _opened(source: EarlierStudy, argument: str) -> optuna.Study:
    if isinstance(source, optuna.Study):
        return source
    where, name = source if isinstance(source, tuple) else (source, None)
    try:
        storage = where if isinstance(where, BaseStorage) else open_storage(where, must_exist=True)
    except StorageError as error:
        raise StorageError(f"{argument}: {error}") from error
    known = optuna.get_all_study_names(storage)
    if name not in known and (name is not None or len(known) != 1):
        raise ValueError(
            f"{argument}={source!r}: which study? There are {', '.join(known) or 'none'}; write (storage, name)"
        )
    return optuna.load_study(storage=storage, study_name=name)
