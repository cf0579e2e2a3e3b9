"""What several objectives gained: the Pareto front, and the volume that it dominates, trial by trial."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from optuna import Study
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from optuna.visualization import plot_hypervolume_history

from lightning_bharat.tuning._optuna import made
from lightning_bharat.tuning.memory_of_failures import violation


def pareto_front(study: Study) -> list[FrozenTrial]:
    """Complete trials that keep their limits and that no other such trial beats, the best in the first objective first.

    Trials with the same values stand for one another: the first stays.
    """
    sign = -1.0 if study.directions[0] == StudyDirection.MAXIMIZE else 1.0
    front = {tuple(trial.values): trial for trial in reversed(study.best_trials)}
    return sorted(front.values(), key=lambda trial: sign * trial.values[0])


def reference_point(study: Study) -> list[float]:
    """From where the volume is measured: the worst value of each objective, and a tenth of the range beyond it.

    Of complete trials that keep their limits, with finite values. It moves when a worse trial comes, so compare volumes
    of two studies only from one point (Ishibuchi et al., How to specify a reference point in hypervolume calculation,
    2018).

    Raises:
        ValueError: no such trial.
    """
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    kept = [trial.values for trial in trials if not violation(trial)]
    values = np.array([each for each in kept if np.isfinite(each).all()])
    if not len(values):
        raise ValueError(f"study {study.study_name!r} has no complete trial that keeps its limits: give a reference")
    signs = np.array([-1.0 if direction == StudyDirection.MAXIMIZE else 1.0 for direction in study.directions])
    losses = values * signs
    worst, best = losses.max(axis=0), losses.min(axis=0)
    span = np.where(worst > best, worst - best, np.maximum(np.abs(worst), 1.0))
    return (signs * (worst + 0.1 * span)).tolist()


def hypervolume_curve(study: Study, reference: Sequence[float] | None = None) -> tuple[list[int], list[float]]:
    """The volume between the front and ``reference`` after each complete trial.

    Args:
        study: with two objectives or more.
        reference: one value for each objective; :func:`reference_point` if None. A trial that is worse than it in any
            objective adds nothing.

    Returns:
        The trials' numbers, and the volume after each.

    Raises:
        ValueError: one objective, or a reference of another length.
    """
    point = reference_point(study) if reference is None else reference
    figure = made(plot_hypervolume_history, {"study": study, "reference_point": point})
    [curve] = figure.data
    return [int(number) for number in curve.x or ()], [float(volume) for volume in curve.y or ()]
