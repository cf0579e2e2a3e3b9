"""A trial that was killed ends as failed, and a new one goes on with its point: once, wherever a kill comes between.

A finished trial can't be changed in any of Optuna's storages, and of several processes that end one, exactly one does.
So the order of writes is:

1. into the trial that was killed: why it ended, and that its point is to be tried again;
2. its state FAIL. From here on it is settled: its point is owed a successor, and whoever looks can see it;
3. the successor, waiting, with ``retry_of``.

A kill before 2 leaves a running trial whose controller is dead: an orphan, found again. A kill between 2 and 3 leaves a
failed trial that is owed a successor: :func:`mend` adds it. Two controllers that mend at once may add one each; trial
numbers are in one order for all, so the first counts, and whoever is given the second ends it (:func:`withdraw`).
"""

from __future__ import annotations

from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState, create_trial

from lightning_bharat.tuning._optuna import storage_of, trial_id
from lightning_bharat.tuning.leases import RUN_BY

RETRY_OF = "retry_of"
POINT = "point"  # of a trial that was enqueued: its values, as text
MAX_RETRIES = 3
_OWED = "bharat:retry"  # in a failed trial: it is owed a successor
# Of one run, not of the point: the successor writes its own.
_OF_A_RUN = {"config", "code", "data", "peak_memory_bytes", "seconds", "steps", "tokens", "end", "where"}
# Beginnings of system attributes; what a sampler noted (a grid's point, the parameters of a queued trial) is kept.
_RESULTS = (_OWED, RUN_BY, "completed_rung_", "constraints", "terminator:")


def retry(study: optuna.Study, trial: FrozenTrial, end: str, max_retries: int = MAX_RETRIES) -> bool:
    """End a trial that was killed, or whose controller was, and queue its point again.

    Args:
        study: The study.
        trial: A running trial, as it was last seen.
        end: Why it ended, one sentence.
        max_retries: How often a point may be tried again after its first trial.

    Returns:
        Whether this call ended it; False if it had ended already, by another controller or with a result.
    """
    if withdraw(study, trial):
        return True
    storage, owed = storage_of(study), tries(study, trial) <= max_retries
    if not owed:
        end += f"; not tried again, as max_retries={max_retries}"
    try:
        storage.set_trial_user_attr(trial_id(trial), "end", end)
        storage.set_trial_system_attr(trial_id(trial), _OWED, owed)
        ended = storage.set_trial_state_values(trial_id(trial), TrialState.FAIL)
    except UpdateFinishedTrialError:
        return False
    if ended and owed:
        study.add_trial(successor(storage.get_trial(trial_id(trial))))
    return ended


def mend(study: optuna.Study) -> int:
    """Add the successors that a kill between two writes left out; returns how many."""
    trials = study.get_trials(deepcopy=False)
    have = {trial.user_attrs.get(RETRY_OF) for trial in trials}
    owed = [trial for trial in trials if _is_owed(trial) and trial.number not in have]
    for trial in owed:
        study.add_trial(successor(trial))
    return len(owed)


def withdraw(study: optuna.Study, trial: optuna.Trial | FrozenTrial) -> bool:
    """End a trial that was just asked for if another one already tries the same point again, or if two hosts that began
    at once have both enqueued it: don't run it then.

    Returns:
        Whether this call ended it.
    """
    first = _first_like(study, trial)
    if first is None or first == trial.number:
        return False
    storage, of = storage_of(study), trial.user_attrs.get(RETRY_OF)
    does = "has the same point" if of is None else f"already retries trial {of}"
    try:
        storage.set_trial_user_attr(trial_id(trial), "end", f"withdrawn: trial {first} {does}")
        return storage.set_trial_state_values(trial_id(trial), TrialState.FAIL)
    except UpdateFinishedTrialError:
        return False


def _first_like(study: optuna.Study, trial: optuna.Trial | FrozenTrial) -> int | None:
    """The first trial that retries the same one, or has the same enqueued point for the first time."""
    others, of = study.get_trials(deepcopy=False), trial.user_attrs.get(RETRY_OF)
    if of is not None:
        return min(other.number for other in others if other.user_attrs.get(RETRY_OF) == of)
    point = trial.user_attrs.get(POINT)
    alike = [o.number for o in others if o.user_attrs.get(POINT) == point and RETRY_OF not in o.user_attrs]
    return min(alike) if point is not None else None


def successor(trial: FrozenTrial) -> FrozenTrial:
    """A waiting trial at the same point: what was suggested, enqueued or chosen from a grid, and the user's notes.

    What was not suggested yet, as the kill came first, is left to the sampler.
    """
    notes: dict[str, Any] = {key: value for key, value in trial.user_attrs.items() if key not in _OF_A_RUN}
    return create_trial(
        state=TrialState.WAITING,
        params=trial.params,
        distributions=trial.distributions,
        user_attrs={**notes, RETRY_OF: trial.number},
        system_attrs={key: value for key, value in trial.system_attrs.items() if not key.startswith(_RESULTS)},
    )


def tries(study: optuna.Study, trial: FrozenTrial) -> int:
    """How many trials had this point up to this one, itself included."""
    by_number = {other.number: other for other in study.get_trials(deepcopy=False)}
    count, of = 1, trial.user_attrs.get(RETRY_OF)
    while of in by_number:
        count, of = count + 1, by_number[of].user_attrs.get(RETRY_OF)
    return count


def copy_reports(old: FrozenTrial, new: optuna.Trial, up_to_step: int) -> None:
    """Give a successor the values that its predecessor reported up to the step of the checkpoint it goes on from.

    Each passes through the pruner as it did then, which notes what it needs (successive halving's rungs); whether to
    prune is answered by the next real report.
    """
    for step, value in sorted(old.intermediate_values.items()):
        if step <= up_to_step:
            new.report(value, step)
            new.should_prune()


def _is_owed(trial: FrozenTrial) -> bool:
    return trial.state == TrialState.FAIL and bool(trial.system_attrs.get(_OWED))
