"""Other hyperparameters near those of a donor: perturbed or drawn anew, within their distributions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any, cast

from optuna.trial import BaseTrial

from lightning_bharat.tuning.space import SearchSpace

_DRAWS = 100  # until one holds the constraints


def explore(
    space: SearchSpace,
    values: Mapping[str, Any],
    random: Random,
    factors: Sequence[float],
    resample: float,
    keys: Sequence[str] | None = None,
) -> dict[str, Any]:
    """A point near ``values``, with the space's conditions and constraints.

    Numbers are multiplied by one of ``factors``; where that leads nowhere (steps, zero, a bound) they go one step on.
    Of choices one beside the present one is taken, in the order in which they are written.

    Args:
        space: what is searched.
        values: of the donor.
        random: where the draws come from.
        factors: one of them is drawn for each parameter.
        resample: probability of a draw from the whole distribution.
        keys: what is explored; the rest stays as it is. ``None``: everything.
    """
    for _ in range(_DRAWS):
        found = space.suggest(cast(BaseTrial, _Explorer(values, random, factors, resample, keys)))
        if space.violated(found) is None:
            return found
    return dict(values)


class _Explorer:
    """A trial as far as :meth:`SearchSpace.suggest` asks it, whose values are near a donor's."""

    def __init__(
        self,
        values: Mapping[str, Any],
        random: Random,
        factors: Sequence[float],
        resample: float,
        keys: Sequence[str] | None,
    ) -> None:
        self._values, self._random, self._factors = values, random, factors
        self._resample, self._keys = resample, keys

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        if self._stays(name):
            return float(self._values[name])
        if self._is_new(name):
            value = self._anywhere(low, high, log)
        else:
            value = self._near(self._values[name], (high - low) / 10)
        if step is not None:
            value = low + step * self._on_grid(name, value, low, step, int((high - low) / step + 1e-9))
        return min(max(value, low), high)

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        if self._stays(name):
            return int(self._values[name])
        value = self._anywhere(low, high, log) if self._is_new(name) else self._near(self._values[name], step)
        return low + step * self._on_grid(name, value, low, step, (high - low) // step)

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        if self._stays(name):
            return self._values[name]
        if self._is_new(name):
            return self._random.choice(list(choices))
        at = list(choices).index(self._values[name])
        beside = [place for place in (at - 1, at + 1) if 0 <= place < len(choices)]
        return choices[self._random.choice(beside)] if beside else choices[at]

    def _stays(self, name: str) -> bool:
        return name in self._values and self._keys is not None and name not in self._keys

    def _is_new(self, name: str) -> bool:
        """Whether it is drawn from all of its distribution; asked once for each parameter."""
        return name not in self._values or self._random.random() < self._resample

    def _anywhere(self, low: float, high: float, log: bool) -> float:
        if log:
            return math.exp(self._random.uniform(math.log(low), math.log(high)))
        return self._random.uniform(low, high)

    def _near(self, value: float, way: float) -> float:
        factor = self._random.choice(list(self._factors))
        return value * factor if value else math.copysign(way, factor - 1)

    def _on_grid(self, name: str, value: float, low: float, step: float, last: int) -> int:
        """The number of the step that is nearest; the one beside the present one, if that is nearest."""
        place = min(max(round((value - low) / step), 0), last)
        if name in self._values and place == (now := round((self._values[name] - low) / step)):
            place = now + (1 if value > self._values[name] else -1 if value < self._values[name] else 0)
        return min(max(place, 0), last)
