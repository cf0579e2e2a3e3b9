"""What we touch of Optuna that is not public, in one place: `tests/tuning/test_samplers.py` fails when a release moves
it.

Optuna's own samplers keep notes of theirs on a trial by the storage, since a sampler is given no ``Trial`` to write to.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import optuna
from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

Made = TypeVar("Made")

# How Optuna names a trial's constraint among the trial's system attributes.
CONSTRAINT = "constraints:"

# The parameters that an enqueued trial must take.
FIXED = "fixed_params"


def all_trials(study: Study) -> list[FrozenTrial]:
    """Every trial of the study, also while a pruner shows a sampler only the trials of one bracket."""
    return study._storage.get_all_trials(study._study_id, deepcopy=False)


def sampled_trials(study: Study) -> list[FrozenTrial]:
    """The trials that Optuna's samplers read. Under Hyperband that is not ``get_trials()``, which has one bracket."""
    return study._get_trials(deepcopy=False)


def note(study: Study, trial: FrozenTrial, key: str, value: Any) -> None:
    """Write a JSON value beside the trial."""
    study._storage.set_trial_system_attr(trial._trial_id, key, value)


def give_up(study: Study, trial: FrozenTrial) -> None:
    """End a trial that has no point: no process will ever tell its result."""
    study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL, None)


def made(make: Callable[..., Made], options: Mapping[str, Any]) -> Made:
    """``make(**options)``, without the line that the class may change in a release: users know it by our name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return make(**options)


class StudyView:
    """A study whose trials a sampler sees as ``trials``; all else is the study's own."""

    def __init__(self, study: Study, trials: Sequence[FrozenTrial]) -> None:
        self._study, self._seen = study, trials

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)

    def _get_trials(
        self, deepcopy: bool = True, states: Sequence[TrialState] | None = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        return [trial for trial in self._seen if states is None or trial.state in states]

    def get_trials(self, deepcopy: bool = True, states: Sequence[TrialState] | None = None) -> list[FrozenTrial]:
        """As ``Study.get_trials``; the trials are copies already."""
        return self._get_trials(deepcopy, states)

    @property
    def trials(self) -> list[FrozenTrial]:
        """As ``Study.trials``."""
        return self._get_trials()


def storage_of(study: optuna.Study) -> BaseStorage:
    """The storage that a study writes to."""
    return study._storage


def study_id(study: optuna.Study) -> int:
    """The storage's number of a study."""
    return study._study_id


def trial_id(trial: optuna.Trial | FrozenTrial) -> int:
    """The storage's number of a trial, which is not ``trial.number``: that counts within a study."""
    return trial._trial_id


def contains(distribution: BaseDistribution, value: Any) -> bool:
    """Whether a parameter of ``distribution`` may have ``value``."""
    return distribution._contains(distribution.to_internal_repr(value))
