"""What a population does next (Jaderberg et al. 2017): exploit and explore at the end of each member's generation.

A member's training is cut into generations. Each generation is a trial: a fit that goes on from a checkpoint, its own
or a donor's. So leases, retries, slots, reports and history are those of any study, and the study alone says what is
next: the same command again goes on with the population.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from optuna import Study, Trial
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from lightning_bharat.tuning.budget import counted, infeasible
from lightning_bharat.tuning.copying import Copying
from lightning_bharat.tuning.generation import Generation
from lightning_bharat.tuning.places import GENERATION, MEMBER, PARENT, Places, by_place, place_of
from lightning_bharat.tuning.population import Population
from lightning_bharat.tuning.proposals import NoFeasiblePoint, Proposals
from lightning_bharat.tuning.retry import RETRY_OF, mend
from lightning_bharat.tuning.space import SearchSpace

if TYPE_CHECKING:
    from lightning_bharat.tuning.bandit import Bandit

FOLDER = "population"  # in the study's: the checkpoints at the ends of generations


def checkpoint_in(folder: Path, number: int) -> Path:
    """Of the end of a trial's generation, in a study's folder."""
    return folder / FOLDER / f"{number:04d}.ckpt"


@dataclass
class _Step:
    """What is to be tried next."""

    member: int
    generation: int
    params: dict[str, Any] = field(default_factory=dict)
    parent: int | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def attrs(self) -> dict[str, Any]:
        said = {MEMBER: self.member, GENERATION: self.generation, **self.notes}
        return said if self.parent is None else {**said, PARENT: self.parent}


class Members(Proposals):
    """Proposes the next generation of a member.

    Args:
        population: how it is trained.
        space: what is searched.
        folder: the study's.
        length: of a member's whole training, in the population's unit.
        seed: of the draws.
        bandit: explores the numbers of copied members; ``None``: they are explored as the others are.
    """

    def __init__(
        self,
        population: Population,
        space: SearchSpace,
        folder: Path,
        length: int,
        seed: int,
        bandit: Bandit | None = None,
    ) -> None:
        super().__init__(space)
        self._population, self._searched, self._folder = population, space, folder
        self._length, self._seed = length, seed
        self._copying = Copying(population, space, length, bandit)
        self._generations = population.generations(length)

    def next(self, study: Study) -> Trial | None:
        """The next trial that can run; ``None``: others must end first.

        What it is stands in the trial before anybody runs it, so a kill in between leaves a waiting trial, and of two
        controllers that add the same one, the first counts.
        """
        for _ in range(self._patience):
            mend(study)
            trials = counted(study.get_trials(deepcopy=False))
            if not any(trial.state == TrialState.WAITING for trial in trials):
                step = self._due(study, by_place(trials))
                if step is None:
                    return None
                study.enqueue_trial(step.params, user_attrs=step.attrs)
            trial = study.ask()
            why_not = self._why_not(study, trial)
            if why_not is None:
                return trial
            trial.set_user_attr("end", why_not)
            study.tell(trial, state=TrialState.FAIL)
        raise NoFeasiblePoint(f"{self._patience} points one after another could not run, the last one: {why_not}")

    def generation(self, trial: Trial) -> Generation:
        """Of the trial.

        Raises:
            FileNotFoundError: the checkpoint that it goes on from is not in the study's folder.
        """
        how, end = self._population, self._population.end(trial.user_attrs[GENERATION], self._length)
        one = Generation(end, how.unit, self._checkpoint(trial.number))
        donor = trial.user_attrs.get(PARENT)
        if donor is None:
            return one
        begins = self._checkpoint(donor)
        if not begins.exists():
            raise FileNotFoundError(
                f"trial {trial.number} goes on from trial {donor}, whose checkpoint {begins} is not there: all hosts "
                "of a population need one shared --folder, whose checkpoints nobody else removes"
            )
        theirs = next(each.params for each in trial.study.get_trials(deepcopy=False) if each.number == donor)
        explored = {key: (theirs.get(key), value) for key, value in trial.params.items() if theirs.get(key) != value}
        return replace(one, begins=begins, donor=donor, explored=explored)

    def trial_ended(self, study: Study) -> None:
        """Remove the checkpoints that nobody goes on from any more; the best trial's stays."""
        trials = study.get_trials(deepcopy=False)
        places = by_place(counted(trials))
        for trial in trials:
            path = self._checkpoint(trial.number)
            if trial.state.is_finished() and path.exists() and not self._is_needed(study, trial, places):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

    def _checkpoint(self, number: int) -> Path:
        return checkpoint_in(self._folder, number)

    def _is_needed(self, study: Study, trial: FrozenTrial, places: Places) -> bool:
        if trial.state != TrialState.COMPLETE:
            return False
        after = self._ended(places, trial.user_attrs[GENERATION] + 1)
        is_past = len(after) == self._population.size and any(each.state == TrialState.COMPLETE for each in after)
        return not is_past or trial in study.best_trials

    def _why_not(self, study: Study, trial: Trial) -> str | None:
        """Why a trial that was just asked for is not to run."""
        attrs = trial.user_attrs
        if MEMBER not in attrs:  # a person's own point
            trials = counted(study.get_trials(deepcopy=False))
            step = self._due(study, by_place(each for each in trials if each.number != trial.number))
            if step is None or step.generation:
                return "withdrawn: the population has all members of its first generation"
            for key, value in step.attrs.items():
                trial.set_user_attr(key, value)
        elif RETRY_OF not in attrs:
            place = attrs[MEMBER], attrs[GENERATION]
            first = min(
                each.number
                for each in study.get_trials(deepcopy=False)
                if place_of(each) == place and RETRY_OF not in each.user_attrs and not infeasible(each)
            )
            if first != trial.number:
                return f"withdrawn: trial {first} is this generation of member {place[0]}"
        violated = self._searched.violated(self._searched.suggest(trial))
        return None if violated is None else f"infeasible: {violated}"

    def _due(self, study: Study, places: Places) -> _Step | None:
        """The step of the member that has come least far, of those that can go on."""
        size = self._population.size
        next_of = {m: next(g for g in range(len(places) + 1) if (m, g) not in places) for m in range(size)}
        for member, generation in sorted(next_of.items(), key=lambda item: (item[1], item[0])):
            if generation == 0:
                return _Step(member, 0)
            own, ended = places[member, generation - 1], self._ended(places, generation - 1)
            waits = self._population.mode == "sync" and len(ended) < size
            if generation < self._generations and own.state.is_finished() and not waits:
                step = self._go_on(study, places, own, ended)
                if step is not None:
                    return step
        return None

    def _ended(self, places: Places, generation: int) -> list[FrozenTrial]:
        """Trials of a generation that are over."""
        return [trial for (_, of), trial in places.items() if of == generation and trial.state.is_finished()]

    def _go_on(self, study: Study, places: Places, own: FrozenTrial, ended: Sequence[FrozenTrial]) -> _Step | None:
        """The member's next generation: exploit and explore, or as before."""
        member, generation = own.user_attrs[MEMBER], own.user_attrs[GENERATION] + 1
        sign = 1 if study.direction == StudyDirection.MINIMIZE else -1
        complete = [trial for trial in ended if trial.state == TrialState.COMPLETE]
        ranked = sorted(
            complete, key=lambda one: (_excess(one), sign * float(one.value or 0.0), one.user_attrs[MEMBER])
        )
        all_ended = len(ended) == self._population.size
        few = max(int(len(ranked) * self._population.quantile), 1 if all_ended else 0)
        failed = own.state != TrialState.COMPLETE
        if failed and not ranked and not all_ended:
            return None  # it waits for a donor
        random = Random(f"{self._seed}/{member}/{generation}")
        if failed and not ranked:  # all have failed: again from where this one began, which is two generations back
            return _Step(member, generation, self._copying.near(own.params, random), own.user_attrs.get(PARENT))
        if failed or (own in ranked[len(ranked) - few :] and own not in ranked[:few]):
            donor = random.choice(ranked[: max(few, 1)])
            params, notes = self._copying.from_donor(study, places, donor, generation, random)
            return _Step(member, generation, params, donor.number, notes)
        return _Step(member, generation, own.params, own.number)


def _excess(trial: FrozenTrial) -> float:
    """How far it is above its limits."""
    return sum(max(value, 0.0) for value in trial.constraints.values())
