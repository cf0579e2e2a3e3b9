"""The next point of a study that earlier ones know something about.

The study's own results are modelled as what the earlier ones expect of them, by its own scale, plus a Gaussian
process of the rest (a stack of two, as in Vizier: Golovin et al., 2017, https://doi.org/10.1145/3097983.3098043): where
the optimum has moved, the second part says so after a few trials. The point of the highest expected improvement is
looked for among random ones and around the best ones.

Only earlier results are ranks here. The study's own are all of one task, and near an optimum ranks tell equal steps
where values say that little is left: with ranks, bowls in four numbers were searched a hundred times less deep.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial
from scipy.stats import norm

from lightning_bharat.tuning.knowledge import encoder_of
from lightning_bharat.tuning.surrogate import Array, Process, to_unit

Params = dict[str, Any]
_RANDOM, _AROUND, _ROUNDS = 300, 100, 3
_SPREAD = 0.2  # of the first points around a best one, in parts of a range; a third of it in each later round


def propose(
    trials: Sequence[FrozenTrial],
    losses: Sequence[float],
    running: Sequence[FrozenTrial],
    distributions: Mapping[str, BaseDistribution],
    prior: Callable[[Sequence[Params]], Array],
    starts: Sequence[Params],
    random: np.random.RandomState,
) -> Params:
    """A point to try.

    Args:
        trials: that have ended, with their ``losses``.
        running: that have not: no point is proposed right beside them.
        distributions: what each parameter may be.
        prior: what earlier studies expect of points, in normal ranks.
        starts: points that earlier studies found good.
        random: draws.
    """
    expected = _model(trials, losses, running, distributions, prior)
    best = [trials[i].params for i in np.argsort(losses, kind="stable")[:3]]
    shapes = [trial.params for trial in trials]
    points = [draw(shapes[random.randint(len(shapes))], distributions, random) for _ in range(_RANDOM)]
    centres, spread = [*best, *starts], _SPREAD
    for _ in range(_ROUNDS):
        points += [_near(centre, distributions, spread, random) for centre in centres for _ in range(_AROUND // 5)]
        order = np.argsort(-expected(points), kind="stable")
        points = [points[i] for i in order[:50]]
        centres, spread = points[:5], spread / 3
    return points[int(np.argmax(expected(points)))]


def _model(
    trials: Sequence[FrozenTrial],
    losses: Sequence[float],
    running: Sequence[FrozenTrial],
    distributions: Mapping[str, BaseDistribution],
    prior: Callable[[Sequence[Params]], Array],
) -> Callable[[Sequence[Params]], Array]:
    """Expected improvement of points."""
    encode = encoder_of(trials, distributions)
    scaled = standardized(losses)
    given = prior([trial.params for trial in trials])
    slope = max(0.0, float(np.cov(given, scaled)[0, 1] / max(np.var(given, ddof=1), 1e-12)))
    offset = scaled.mean() - slope * given.mean()
    rest = scaled - offset - slope * given
    seen = [trial.params for trial in [*trials, *running]]
    # A running trial is believed to end as expected (Ginsbourger et al., 2010, kriging believer).
    process = Process(encode(seen), np.concatenate([rest, np.zeros(len(running))]))
    best = min(scaled)

    def improvement(points: Sequence[Params]) -> Array:
        mean, deviation = process.predict(encode(points))
        gain = best - (mean + offset + slope * prior(points))
        return gain * norm.cdf(gain / deviation) + deviation * norm.pdf(gain / deviation)

    return improvement


def standardized(losses: Sequence[float]) -> Array:
    """``losses`` with mean 0 and variance 1. Those farther above the median than the best is below it are as far: a run
    that blew up says no more than that. Not where half of them are the best, as an accuracy's may be."""
    values = np.asarray(losses, float)
    reach = np.median(values) - values.min()
    if reach > 0:
        values = np.minimum(values, values.min() + 2 * reach)
    return (values - values.mean()) / (values.std() or 1.0)


def draw(
    names: Mapping[str, Any], distributions: Mapping[str, BaseDistribution], random: np.random.RandomState
) -> Params:
    """A random value for each of ``names``."""
    return {name: from_unit(random.rand(), distributions[name]) for name in names}


def _near(
    centre: Params, distributions: Mapping[str, BaseDistribution], spread: float, random: np.random.RandomState
) -> Params:
    """``centre``, with some of its parameters moved."""
    moved = random.rand(len(centre)) < max(0.5, 1 / max(len(centre), 1))
    return {
        name: _moved(value, distributions[name], spread, random) if move else value
        for (name, value), move in zip(centre.items(), moved, strict=True)
    }


def _moved(value: Any, distribution: BaseDistribution, spread: float, random: np.random.RandomState) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return from_unit(random.rand(), distribution) if random.rand() < spread else value
    return from_unit(min(max(to_unit(value, distribution) + spread * random.randn(), 0.0), 1.0), distribution)


def from_unit(unit: float, distribution: BaseDistribution) -> Any:
    """The value that lies at ``unit`` of the range, on its steps."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[min(int(unit * len(distribution.choices)), len(distribution.choices) - 1)]
    assert isinstance(distribution, (FloatDistribution, IntDistribution))
    low, high = distribution.low, distribution.high
    value = low * (high / low) ** unit if distribution.log else low + unit * (high - low)
    return clipped(value, distribution)


def clipped(value: float, distribution: FloatDistribution | IntDistribution) -> float:
    """The nearest number that the range and its steps allow."""
    value = min(max(value, distribution.low), distribution.high)
    if distribution.step is not None:
        steps = int((distribution.high - distribution.low) / distribution.step + 1e-8)
        value = distribution.low + min(round((value - distribution.low) / distribution.step), steps) * distribution.step
    return int(value) if isinstance(distribution, IntDistribution) else float(min(value, distribution.high))
