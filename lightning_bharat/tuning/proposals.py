"""The next point of a study: asked from Optuna, with a value for each key of the space, and within its constraints."""

from __future__ import annotations

from optuna import Study, Trial
from optuna.trial import TrialState

from lightning_bharat.tuning.generation import Generation
from lightning_bharat.tuning.space import SearchSpace


class NoFeasiblePoint(ValueError):
    """The constraints leave too little of the space."""


class Proposals:
    """Asks for points until one holds the space's constraints; the others never run.

    Args:
        space: ``None``: an objective function asks for its values itself.
        patience: points one after another that may break a constraint.
    """

    def __init__(self, space: SearchSpace | None, patience: int = 1000) -> None:
        self._space, self._patience = space, patience

    def next(self, study: Study) -> Trial | None:
        """A trial that can run; ``None``: there is one when others have ended.

        Raises:
            NoFeasiblePoint: too many points one after another broke a constraint.
        """
        broken = ""
        for _ in range(self._patience):
            trial = study.ask()
            if self._space is None:
                return trial
            values = self._space.suggest(trial)
            violated = self._space.violated(values)
            if violated is None:
                return trial
            broken = violated
            trial.set_user_attr("end", f"infeasible: {violated}")
            study.tell(trial, state=TrialState.FAIL)
        raise NoFeasiblePoint(
            f"{self._patience} points one after another broke a constraint, the last one {broken!r}: the constraints "
            "leave too little of the space; narrow the ranges of their parameters"
        )

    def generation(self, trial: Trial) -> Generation | None:
        """Which part of a training a trial is; ``None``: all of it."""
        return None

    def trial_ended(self, study: Study) -> None:
        """After each trial."""
