"""What an earlier study knows, as a function of its parameters: a Gaussian process of its results' ranks.

Values of two tasks have different scales and tails; ranks do not. Each result becomes the quantile of a normal
distribution at its rank (Salinas et al., 2020, A quantile-based approach for hyperparameter transfer learning,
http://proceedings.mlr.press/v119/salinas20a.html).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from scipy.linalg import cho_factor, cho_solve, cholesky, solve_triangular
from scipy.optimize import minimize
from scipy.stats import norm, rankdata

Array = np.ndarray
_JITTER = 1e-6


def normal_ranks(losses: Sequence[float]) -> Array:
    """Quantiles of the normal distribution at the ranks of ``losses``; like values get like ones."""
    return norm.ppf((rankdata(losses) - 0.5) / len(losses))


class Encoder:
    """Parameters as points of a cube: numbers in their range (of their logarithm where the distribution has it), each
    choice a coordinate, and one that says whether a conditional parameter is there.

    Args:
        distributions: by name.
        conditional: names that some trials lack.
    """

    def __init__(self, distributions: Mapping[str, BaseDistribution], conditional: frozenset[str]) -> None:
        self.distributions, self.conditional = dict(distributions), conditional

    def __call__(self, points: Sequence[Mapping[str, Any]]) -> Array:
        """(points, coordinates). What a point lacks lies in the middle."""
        return np.array([[x for name in self.distributions for x in self._of(name, point)] for point in points])

    def _of(self, name: str, point: Mapping[str, Any]) -> list[float]:
        distribution, given = self.distributions[name], name in point
        there = [float(given)] if name in self.conditional else []
        if isinstance(distribution, CategoricalDistribution):
            chosen = point.get(name) if given else None
            return there + [float(given and _same(choice, chosen)) / 2**0.5 for choice in distribution.choices]
        return [*there, to_unit(point[name], distribution) if given else 0.5]


def _same(a: Any, b: Any) -> bool:
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def to_unit(value: float, distribution: BaseDistribution) -> float:
    """Where a number lies between the ends of its range, 0 to 1; outside of it at the nearer end."""
    assert isinstance(distribution, (FloatDistribution, IntDistribution))
    low, high = distribution.low, distribution.high
    if distribution.log:
        low, high, value = math.log(low), math.log(high), math.log(max(value, low))
    return min(max((value - low) / (high - low), 0.0), 1.0) if high > low else 0.5


class Process:
    """A Gaussian process with a Matérn 5/2 kernel that has a length for each coordinate.

    Args:
        x: (n, coordinates), in the unit cube.
        y: (n,).
    """

    def __init__(self, x: Array, y: Array) -> None:
        self.x = x
        self.lengths, self.amplitude, self.noise = _fit(x, y)
        kernel = self.amplitude * _matern(x, x, self.lengths) + (self.noise + _JITTER) * np.eye(len(x))
        self._root = cholesky(kernel, lower=True)
        self._weights = cho_solve((self._root, True), y)

    def predict(self, x: Array) -> tuple[Array, Array]:
        """Mean and standard deviation, without the noise, at (m, coordinates)."""
        cross = self.amplitude * _matern(x, self.x, self.lengths)
        explained = solve_triangular(self._root, cross.T, lower=True)
        variance = np.maximum(self.amplitude - (explained**2).sum(0), 1e-12)
        return cross @ self._weights, np.sqrt(variance)


def _matern(a: Array, b: Array, lengths: Array) -> Array:
    r = _distances(a, b, lengths)
    return (1 + r + r**2 / 3) * np.exp(-r)


def _distances(a: Array, b: Array, lengths: Array) -> Array:
    """Times √5, as the kernel has them."""
    scaled_a, scaled_b = a / lengths, b / lengths
    squares = (scaled_a**2).sum(1)[:, None] + (scaled_b**2).sum(1)[None] - 2 * scaled_a @ scaled_b.T
    return np.sqrt(5 * np.maximum(squares, 0.0))


def _fit(x: Array, y: Array) -> tuple[Array, float, float]:
    """Lengths, amplitude and noise that make ``y`` likeliest, under weak priors that keep few points from a fit that is
    too sure (lengths about 0.5, noise about 0.02 of the variance)."""
    free = x.shape[1]
    start = np.array([math.log(0.5)] * free + [0.0, math.log(0.02)])
    width = np.array([1.0] * free + [1.0, 1.5])
    apart = (x[:, None] - x[None]) ** 2

    def surprise(theta: Array) -> tuple[float, Array]:
        """And its gradient (Rasmussen and Williams, 2006, Gaussian processes for machine learning, section 5.4.1)."""
        own = np.exp(theta[:free])
        r, (amplitude, noise) = _distances(x, x, own), np.exp(theta[-2:])
        signal = amplitude * (1 + r + r**2 / 3) * np.exp(-r)
        root = cho_factor(signal + (noise + _JITTER) * np.eye(len(x)), lower=True)
        weights = cho_solve(root, y)
        slope = 0.5 * (cho_solve(root, np.eye(len(x))) - np.outer(weights, weights))
        by_length = np.tensordot(slope * amplitude * 5 / 3 * (1 + r) * np.exp(-r), apart, 2) / own**2
        gradient = np.array([*by_length[:free], (slope * signal).sum(), noise * np.trace(slope)])
        away = (theta - start) / width
        value = 0.5 * y @ weights + np.log(np.diag(root[0])).sum() + 0.5 * (away**2).sum()
        return float(value), gradient + away / width

    bounds = [(math.log(0.05), math.log(10.0))] * free + [(math.log(1e-2), math.log(10.0)), (math.log(1e-4), 0.0)]
    found = minimize(surprise, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 60}).x
    return np.exp(found[:free]), math.exp(found[-2]), math.exp(found[-1])
