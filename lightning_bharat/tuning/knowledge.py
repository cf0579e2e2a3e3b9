"""What one earlier study says about points of another, and how far the other's own results agree with it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FrozenTrial
from scipy.stats import norm, spearmanr

from lightning_bharat.tuning.earlier import Earlier
from lightning_bharat.tuning.surrogate import Array, Encoder, Process, normal_ranks

MOST_TRIALS = 200  # of a source: the process costs the cube of their number
LEAST_RESULTS = 5  # before which no agreement is seen


class Knowledge:
    """A model of an earlier study.

    Args:
        earlier: what it found.
    """

    def __init__(self, earlier: Earlier) -> None:
        self.name, self.best_first = earlier.name, earlier.best_first
        self.distributions = earlier.distributions
        trials, ranks = _thinned(earlier)
        self._encode = encoder_of(trials, self.distributions)
        self._process = Process(self._encode([trial.params for trial in trials]), ranks)

    def predict(self, trials: Sequence[FrozenTrial]) -> Array:
        """Normal ranks that it expects of trials of another study, low for good ones."""
        return self.predict_points([self.shared(trial.params, trial.distributions) for trial in trials])

    def predict_points(self, points: Sequence[Mapping[str, Any]]) -> Array:
        """The same for parameters that it knows."""
        return self._process.predict(self._encode(points))[0]

    def shared(self, params: Mapping[str, Any], distributions: Mapping[str, BaseDistribution]) -> dict[str, Any]:
        """Those of ``params`` that it had too: of the same name, and both numbers or both choices."""
        own = self.distributions
        return {
            name: value
            for name, value in params.items()
            if name in own and _is_choice(own[name]) == _is_choice(distributions[name])
        }

    def agreement(self, trials: Sequence[FrozenTrial], losses: Sequence[float], risk: float) -> float:
        """The lower end of an interval of the rank correlation between what it expects and ``losses``; 0 if it is not
        above 0, as for a study that has nothing to do with this one.

        Fisher's transformation, with the variance that ranks have (Bonett and Wright, 2000,
        https://doi.org/10.1007/BF02294183).

        Args:
            trials: of the other study.
            losses: their results.
            risk: probability that an unrelated study passes.
        """
        expected = self.predict(trials) if len(trials) >= LEAST_RESULTS else np.zeros(0)
        if not len(expected) or np.ptp(expected) < 1e-9 or np.ptp(losses) == 0:
            return 0.0
        rho = min(float(spearmanr(expected, losses).statistic), 0.999)
        deviation = math.sqrt((1 + rho**2 / 2) / (len(trials) - 3))
        return max(0.0, math.tanh(math.atanh(rho) - float(norm.ppf(1 - risk)) * deviation)) if rho > 0 else 0.0


def encoder_of(trials: Sequence[FrozenTrial], distributions: Mapping[str, BaseDistribution]) -> Encoder:
    """For parameters of ``trials``, those that not all of them have being conditional."""
    return Encoder(distributions, frozenset(n for n in distributions if not all(n in t.params for t in trials)))


def _thinned(earlier: Earlier) -> tuple[list[FrozenTrial], Array]:
    """At most :data:`MOST_TRIALS`, evenly over their ranks, the best among them."""
    ranks = normal_ranks(earlier.losses)
    order = np.argsort(earlier.losses, kind="stable")
    kept = order[np.unique(np.linspace(0, len(order) - 1, min(len(order), MOST_TRIALS)).round().astype(int))]
    return [earlier.trials[i] for i in kept], ranks[kept]


def _is_choice(distribution: BaseDistribution) -> bool:
    return isinstance(distribution, CategoricalDistribution)
