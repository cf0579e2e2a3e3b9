"""How many trials a study is to have, and what else ends it."""

from __future__ import annotations

from collections.abc import Sequence

from optuna import Study
from optuna.trial import FrozenTrial, TrialState

from lightning_bharat.tuning.stopping import Rule, why_stop


class Budget:
    """Says whether one more trial is to run.

    A study's trials are counted over all its controllers and starts, so the same command again goes on with it.
    Points that broke a constraint never ran, and a trial that was retried counts once.

    Args:
        n_trials: in all; ``None``: no limit.
        rules: each may end the study earlier.
    """

    def __init__(self, n_trials: int | None, rules: Sequence[Rule] = ()) -> None:
        self._n_trials, self._rules = n_trials, rules
        self.reason: str | None = None

    def open(self, study: Study) -> bool:
        """Whether there is room for one more; :attr:`reason` says why not."""
        begun, _ = _counts(study)
        if self._n_trials is not None and begun >= self._n_trials:
            self.reason = f"the study has its {self._n_trials} trials"
        else:
            self.reason = why_stop(study, self._rules)
        return self.reason is None

    def hangs_on(self, study: Study) -> int:
        """How many trials run whose ends the study waits for: one that is killed leaves room for another."""
        begun, running = _counts(study)
        may_be_missed = self._n_trials is not None and begun - running < self._n_trials
        return running if may_be_missed and why_stop(study, self._rules) is None else 0


def _counts(study: Study) -> tuple[int, int]:
    """How many trials have begun, of those that count, and how many of these run."""
    trials = counted(study.get_trials(deepcopy=False))
    begun = [trial for trial in trials if trial.state != TrialState.WAITING]  # an enqueued one is the next to run
    return len(begun), sum(trial.state == TrialState.RUNNING for trial in begun)


def counted(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Those that count: not those that never ran, and of retried ones the last."""
    retried = {trial.user_attrs["retry_of"] for trial in trials if "retry_of" in trial.user_attrs}
    return [trial for trial in trials if trial.number not in retried and not never_ran(trial)]


def infeasible(trial: FrozenTrial) -> bool:
    """Whether it broke a constraint on its values, and so never ran."""
    return _end(trial).startswith("infeasible")


def never_ran(trial: FrozenTrial) -> bool:
    """Whether it is infeasible, or the second retry of a trial that has one."""
    return _end(trial).startswith(("infeasible", "withdrawn"))


def _end(trial: FrozenTrial) -> str:
    return str(trial.user_attrs.get("end", "")) if trial.state == TrialState.FAIL else ""
