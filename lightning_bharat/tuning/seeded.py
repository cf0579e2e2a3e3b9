"""One of Optuna's samplers, whose draws depend on the seed and on the trial's number alone.

An Optuna sampler begins its random numbers anew when it is made. A seeded study that is killed and goes on would draw
the same points a second time, and with several workers the points would depend on who asks first. So each trial gets a
sampler of its own, seeded by the study's seed and the trial's number; what samplers learn they read from the study.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from lightning_bharat.tuning.memory_of_failures import remembered


class SeededByTrial(BaseSampler):
    """A sampler for each trial.

    Args:
        name: what users call it.
        make: builds Optuna's sampler from a seed.
        seed: of the study; None draws one.
        ranked: the sampler reads values alone, no constraints.
    """

    def __init__(self, name: str, make: Callable[[int], BaseSampler], seed: int | None, ranked: bool = False) -> None:
        self.name, self.ranked = name, ranked
        self._make = make
        self._seed = secrets.randbits(32) if seed is None else seed
        self._samplers: dict[int, BaseSampler] = {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, seed={self._seed})"

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """As Optuna's."""
        self._of(trial).before_trial(study, trial)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """As Optuna's."""
        return self._of(trial).infer_relative_search_space(self._seen(study), trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """As Optuna's."""
        return self._of(trial).sample_relative(self._seen(study), trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """As Optuna's."""
        return self._of(trial).sample_independent(self._seen(study), trial, param_name, param_distribution)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """As Optuna's. CMA-ES would only warn that it reads no constraints, and here it need not."""
        sampler = self._of(trial)
        del self._samplers[trial.number]
        if not self.ranked:
            sampler.after_trial(study, trial, state, values)

    def reseed_rng(self) -> None:
        """Nothing: no two trials share random numbers, on however many threads they run."""

    def _of(self, trial: FrozenTrial) -> BaseSampler:
        if trial.number not in self._samplers:
            seed = np.random.SeedSequence([self._seed, trial.number]).generate_state(1)[0]
            self._samplers[trial.number] = self._make(int(seed))
        return self._samplers[trial.number]

    def _seen(self, study: Study) -> Study:
        return remembered(study, self.ranked)
