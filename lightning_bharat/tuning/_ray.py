"""What we touch of Ray that is not public, in one place: `tests/tuning/test_bandit.py` fails when a release moves it.

Importing it starts nothing of Ray.
"""

from __future__ import annotations

import warnings

import numpy as np
from ray.tune.schedulers import pb2
from sklearn.exceptions import ConvergenceWarning

from lightning_bharat.tuning.surrogate import Array

# Ray's module leaves its model out without a word where scikit-learn is missing; the import of this says so. It warns
# of fits that end at the ends of their ranges and of variances below 0 by rounding, as with few points they do; SciPy
# warns of an option that Ray gives.
_USUAL = (ConvergenceWarning, UserWarning, DeprecationWarning)


def next_point(seen: Array, gains: Array, pending: Array | None, begins: Array, seed: int) -> Array:
    """The point of the highest upper confidence bound of the next gain, as Ray's PB2 scheduler finds it.

    Args:
        seen: (n, 2 + coordinates): time, the metric before, and a point in the unit cube, in the order of time.
        gains: (n,), what came of each.
        pending: (m, coordinates), points whose gain is not known yet; ``None``: there are none.
        begins: (2,), time and metric of the weights that go on with the point.
        seed: of the places from which the bound's highest point is looked for: Ray draws them from NumPy's global
            generator, which is left as it was.

    Returns:
        (coordinates,).

    Raises:
        numpy.linalg.LinAlgError: the model has no solution, as where two points are nearly one.
        ValueError: likewise, where Ray tries to mend that.
    """
    bounds = {str(place): (0.0, 1.0) for place in range(seen.shape[1] - 2)}
    before = np.random.get_state()
    np.random.seed(seed)
    try:
        with warnings.catch_warnings():
            for category in _USUAL:
                warnings.simplefilter("ignore", category)
            return pb2._select_config(seen, gains, pending, begins, bounds, num_f=2)
    finally:
        np.random.set_state(before)
