"""The values that a member goes on with when it is copied from another one, or tries again: explored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import TYPE_CHECKING, Any

from optuna import Study
from optuna.trial import FrozenTrial

from lightning_bharat.tuning.explore import explore
from lightning_bharat.tuning.improvements import Improvements, NoProposal
from lightning_bharat.tuning.places import GENERATION, Places
from lightning_bharat.tuning.population import Population
from lightning_bharat.tuning.space import SearchSpace

if TYPE_CHECKING:
    from lightning_bharat.tuning.bandit import Bandit

EXPLORED_BY = "explored_by"  # in a copy's trial, if a bandit is there: who explored, and why not the bandit


class Copying:
    """Explores.

    Args:
        population: how it is trained.
        space: what is searched.
        length: of a member's whole training, in the population's unit.
        bandit: explores numbers; ``None``: they are explored as the others are.
    """

    def __init__(self, population: Population, space: SearchSpace, length: int, bandit: Bandit | None) -> None:
        self._population, self._space, self._length, self._bandit = population, space, length, bandit

    def near(self, values: Mapping[str, Any], random: Random, keys: Sequence[str] | None = None) -> dict[str, Any]:
        """Values near given ones, of the population's keys or of others."""
        how = self._population
        return explore(self._space, values, random, how.factors, how.resample, how.explore if keys is None else keys)

    def from_donor(
        self, study: Study, places: Places, donor: FrozenTrial, generation: int, random: Random
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The values of a member that goes on with a donor's weights, and what its trial says of them.

        Args:
            study: of the population.
            places: its trials.
            donor: one of them.
            generation: that is to come.
            random: the draws of this member and generation.
        """
        if self._bandit is None:
            return self.near(donor.params, random), {}
        shown = Improvements(study, self._bandit.numbers, lambda of: self._population.end(of, self._length))
        trials = [trial for _, trial in sorted(places.items())]
        ended = [trial for trial in trials if self._has_shown(trial, generation)]
        pending = [trial for trial in trials if not self._has_shown(trial, generation)]
        seed = random.getrandbits(32)
        try:
            found = self._bandit.explore(donor, shown, ended, pending, lambda v, keys: self.near(v, random, keys), seed)
        except NoProposal as why_not:
            return self.near(donor.params, random), {EXPLORED_BY: f"pbt: {why_not}"}
        return found, {EXPLORED_BY: "pb2"}

    def _has_shown(self, trial: FrozenTrial, generation: int) -> bool:
        """Whether it counts as ended for who begins a generation.

        Synchronously who is first to end a generation must not change what the others try in it: all of it is yet to
        come, as it is where they all run at once.
        """
        if self._population.mode == "sync":
            return trial.user_attrs[GENERATION] < generation
        return trial.state.is_finished()
