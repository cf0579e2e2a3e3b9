"""What a person sees of a study: a line for each trial, the best config as a file, and how it ended."""

from __future__ import annotations

import shutil
from collections.abc import Callable

from optuna import Study
from optuna.trial import TrialState

from lightning_bharat.tuning.budget import counted, infeasible
from lightning_bharat.tuning.trial_run import CONFIG
from lightning_bharat.tuning.work import Work

BEST = "best.yaml"


class Best:
    """Keeps ``best.yaml`` in a study's folder, which ``bharat fit --config`` takes.

    Args:
        study: Optuna's.
        work: of its trials.
        say: told one line at a time.
    """

    def __init__(self, study: Study, work: Work, say: Callable[[str], None]) -> None:
        self._study, self._work, self._folder, self._say = study, work, work.folder, say

    def trial_ended(self, line: str) -> None:
        """After each trial."""
        best = self._numbers()
        if len(self._study.directions) > 1 or not best:
            self._say(line)
            return
        self._say(f"{line} (best: trial {best[0]})")
        self._keep(best[0])

    def study_ended(self, reason: str | None) -> None:
        """Say how many trials there are, by their ends, and which is best."""
        trials = self._study.get_trials(deepcopy=False)
        mine = counted(trials)
        states = {state: sum(trial.state == state for trial in mine) for state in TrialState}
        said = ", ".join(f"{number} {state.name.lower()}" for state, number in states.items() if number)
        broken = sum(map(infeasible, trials))
        share = f"; {broken / len(trials):.0%} of all points broke a constraint and never ran" if broken else ""
        self._say(f"{reason or 'interrupted'}: {said or 'no trial'}{share}")
        best = self._numbers()
        if best and len(self._study.directions) == 1:
            self._say(f"best: trial {best[0]}, {self._study.best_value:.6g}{self._where()}")
        elif best:
            self._say(f"on the Pareto front: trials {', '.join(map(str, best))}")

    def _numbers(self) -> list[int]:
        try:
            return [trial.number for trial in self._study.best_trials]
        except ValueError:  # no trial is complete, or none is feasible
            return []

    def _keep(self, number: int) -> None:
        config = self._work.trial_folder(number) / CONFIG
        if config.is_file():
            shutil.copyfile(config, self._folder / f".{BEST}")
            (self._folder / f".{BEST}").replace(self._folder / BEST)

    def _where(self) -> str:
        return f", {self._folder / BEST}" if (self._folder / BEST).is_file() else ""
