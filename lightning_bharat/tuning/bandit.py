"""Population-based bandits (PB2, Parker-Holder et al. 2020, arXiv 2002.02518), by Ray's own implementation.

The numbers of a copied member are where a Gaussian process expects the largest improvement of the next generation, or
knows least: the upper end of what it holds possible. It forgets with time, since what is good changes in a training.
All that it knows it reads from the study, so that a study that goes on proposes what it would have proposed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial

from lightning_bharat.tuning._ray import next_point
from lightning_bharat.tuning.acquisition import from_unit
from lightning_bharat.tuning.improvements import Improvements, NoProposal, numbers_of, unit_point
from lightning_bharat.tuning.space import SearchSpace
from lightning_bharat.tuning.surrogate import Array

_LEAST = 2  # generations that have shown something; the improvement of one says nothing about others
_MOST = 200  # the latest of them: of more, Ray tries how many fit best, which takes the fourth power of their number
_SHARES = (1.0, 0.5, 0.25, 0.125)  # of the way to the proposal


class Bandit:
    """Explores by what the population has shown.

    Args:
        space: what is searched.
        keys: what is explored of it; ``None``: all.

    Attributes:
        numbers: what it chooses. The others are the caller's.
    """

    def __init__(self, space: SearchSpace, keys: Sequence[str] | None) -> None:
        self._space, self.numbers = space, numbers_of(space, keys)
        self._others = [key for key in (keys or space.distributions) if key not in self.numbers]

    def explore(
        self,
        donor: FrozenTrial,
        shown: Improvements,
        ended: Sequence[FrozenTrial],
        pending: Sequence[FrozenTrial],
        rest: Callable[[Mapping[str, Any], Sequence[str]], dict[str, Any]],
        seed: int,
    ) -> dict[str, Any]:
        """A point for a member that goes on from a donor's weights.

        Where a proposal breaks a constraint, a point between the donor's and it is taken.

        Args:
            donor: which holds the constraints.
            shown: what generations have shown.
            ended: trials from which it learns.
            pending: trials whose improvement is not known yet, beside which it proposes nothing.
            rest: explores the given other keys from the given values on.
            seed: of the search for the proposal.

        Raises:
            NoProposal: too little is known yet, or no point on the way to the proposal holds the constraints.
        """
        at, to = unit_point(donor, self.numbers), self._proposal(donor, shown, ended, pending, seed)
        for share in _SHARES:
            between = at + share * (to - at)
            chosen = {key: from_unit(float(x), self.numbers[key]) for key, x in zip(self.numbers, between, strict=True)}
            found = rest({**donor.params, **chosen}, self._others)
            if self._space.violated(found) is None:
                return found
        raise NoProposal("no point on the way to the proposal holds the constraints")

    def _proposal(
        self,
        donor: FrozenTrial,
        shown: Improvements,
        ended: Sequence[FrozenTrial],
        pending: Sequence[FrozenTrial],
        seed: int,
    ) -> Array:
        begins, (seen, gains) = shown.begins(donor), shown.of(ended)
        if begins is None or len(gains) < _LEAST:
            raise NoProposal("too few generations have shown an improvement yet")
        waiting = [point for point in (unit_point(trial, self.numbers) for trial in pending) if point is not None]
        try:
            return next_point(
                seen[-_MOST:],
                gains[-_MOST:],
                np.unique(waiting, axis=0) if waiting else None,
                np.array(begins),
                seed,
            ).astype(float)
        except (np.linalg.LinAlgError, ValueError) as error:
            raise NoProposal(f"Ray's model has no solution: {error}") from error
