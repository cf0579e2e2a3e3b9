"""Earlier studies, as warm start and transfer read them: finished trials with their values, the lowest the best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

JOURNAL = "study.journal"  # in a study's folder

EarlierStudy = optuna.Study | str | Path | tuple[str | BaseStorage, str]


@dataclass(frozen=True)
class Earlier:
    """What an earlier study found.

    Attributes:
        name: the study's.
        trials: that are complete, finite and feasible.
        losses: of each; the study's values, turned around where the highest was the best.
    """

    name: str
    trials: Sequence[FrozenTrial]
    losses: Sequence[float]

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
        source: a study; a study's folder, with its ``study.journal``; or its storage (a URL or an Optuna storage) and
            its name.
        argument: what the user calls it, for errors.

    Raises:
        ValueError: it can't be found, has several objectives, or has no finished trial.
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
    return Earlier(study.study_name, trials, losses_of(study, trials))


def usable_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Those whose value says how good their parameters are: complete, finite and feasible."""
    return [trial for trial in study.get_trials(deepcopy=False) if _is_usable(trial)]


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
    storage, name = source if isinstance(source, tuple) else (_journal(Path(source), argument), None)
    try:
        return optuna.load_study(storage=storage, study_name=name)
    except KeyError:
        known = optuna.get_all_study_names(storage)
        raise ValueError(
            f"{argument}={source!r}: no such study there; there are {', '.join(known) or 'none'}"
        ) from None


def _journal(folder: Path, argument: str) -> JournalStorage:
    journal = folder / JOURNAL
    if not journal.is_file():
        raise ValueError(
            f"{argument}={str(folder)!r}: there is no {JOURNAL} in it; write a study's folder, such as runs/NAME, an "
            "optuna.Study, or (storage, name)"
        )
    return JournalStorage(JournalFileBackend(str(journal)))
