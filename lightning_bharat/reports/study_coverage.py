"""How much of a search space a study has looked at.

The unit cube is cut into 2^k boxes of the same size by halving one side after another, as in Sobol's property A: the
first 2^k points of a good sequence put one into each box (I. M. Sobol', *Uniformly distributed sequences with an
additional uniform property*, 1976). The share of boxes that the trials hit is compared with what as many random points
hit on average, since even those leave more than a third of as many boxes empty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from math import ceil, exp, floor, log, log2, prod
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

Point = tuple[Mapping[str, Any], Mapping[str, BaseDistribution]]


@dataclass(frozen=True)
class Share:
    """Of boxes.

    Attributes:
        trials: that were counted.
        cells: 2^k boxes.
        hit: a share of 1: boxes with a trial in them.
        random: the same for as many random points, in expectation.
    """

    trials: int
    cells: int
    hit: float
    random: float


@dataclass(frozen=True)
class Coverage:
    """Of a search space.

    Attributes:
        joint: of the parameters that all trials have, with the mean over which of them is halved first; ``None``: there
            are no trials, or no parameter that all have.
        single: of each parameter alone, over the trials that have it.
    """

    joint: Share | None
    single: dict[str, Share]

    @classmethod
    def of(cls, points: Sequence[Point]) -> Coverage:
        """Of trials, each its parameters and their distributions."""
        sides = {name: side for name, side in _sides(points).items() if side.halves(1)}
        columns = {
            name: [side.place(params[name]) for params, _ in points if name in params] for name, side in sides.items()
        }
        single = {name: _share([sides[name]], [columns[name]], len(columns[name])) for name in sides}
        common = [name for name in sides if len(columns[name]) == len(points)]
        if not common:
            return cls(None, single)
        rotated = [common[i:] + common[:i] for i in range(len(common))]
        shares = [_share([sides[n] for n in names], [columns[n] for n in names], len(points)) for names in rotated]
        hit, random = (sum(getattr(share, name) for share in shares) / len(shares) for name in ("hit", "random"))
        return cls(Share(len(points), shares[0].cells, hit, random), single)

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        single = {name: vars(share) for name, share in self.single.items()}
        return {"joint": self.joint and vars(self.joint), "single": single}


@dataclass(frozen=True)
class _Side:
    """One parameter's side of the unit cube, in the scale that is sampled.

    Attributes:
        low, high: its ends, in that scale.
        choices: of a categorical parameter.
        log: whether the scale is logarithmic.
        values: how many different values there are; 0: as many as one likes.
        step: between values of a stepped one.
    """

    low: float
    high: float
    choices: tuple[Any, ...] = ()
    log: bool = False
    values: int = 0
    step: float = 1.0

    def halves(self, times: int) -> bool:
        """Whether it can be halved so often with a value in each part."""
        if not self.values:
            return self.high > self.low
        if 2**times > self.values:
            return False
        return not self.log or all(self.masses(times))  # there, small whole numbers are far apart

    def place(self, value: Any) -> float:
        """Of a value, from 0 to 1."""
        if self.choices:
            at = self.choices.index(value) + 0.5
        elif self.values and not self.log:
            at = (float(value) - self.low) / self.step + 0.5
        else:
            at = log(value) if self.log else float(value)
            return (at - self.low) / (self.high - self.low)
        return min(at / self.values, 1.0)

    def masses(self, halvings: int) -> list[float]:
        """The chance of each of the 2^halvings parts under random sampling."""
        parts = 2**halvings
        if not self.values:
            return [1 / parts] * parts
        if not self.log:
            first = [ceil(part * self.values / parts - 0.5) for part in range(parts + 1)]
            return [(end - begin) / self.values for begin, end in pairwise(first)]
        width = self.high - self.low  # a whole number stands for all that is rounded to it
        inner = [log(ceil(exp(self.low + part * width / parts)) - 0.5) for part in range(1, parts)]
        return [(end - begin) / width for begin, end in pairwise([self.low, *inner, self.high])]


def _part(place: float, halvings: int) -> int:
    return min(int(place * 2**halvings), 2**halvings - 1)


def _share(sides: Sequence[_Side], columns: Sequence[Sequence[float]], trials: int) -> Share:
    """Halve the sides in turn until there are as many boxes as trials, or no side can be halved."""
    halvings = [0] * len(sides)
    for _ in range(floor(log2(trials))):
        open_sides = [i for i, side in enumerate(sides) if side.halves(halvings[i] + 1)]
        if not open_sides:
            break
        halvings[min(open_sides, key=lambda i: halvings[i])] += 1
    boxes = {tuple(_part(p, h) for p, h in zip(point, halvings, strict=True)) for point in zip(*columns, strict=True)}
    cells = 2 ** sum(halvings)
    masses = [side.masses(h) for side, h in zip(sides, halvings, strict=True) if h]
    expected = sum(1 - (1 - prod(mass)) ** trials for mass in product(*masses)) if masses else 1.0
    return Share(trials, cells, len(boxes) / cells, expected / cells)


def _sides(points: Sequence[Point]) -> dict[str, _Side]:
    found: dict[str, list[BaseDistribution]] = {}
    for _, distributions in points:
        for name, distribution in distributions.items():
            seen = found.setdefault(name, [])
            if distribution not in seen:
                seen.append(distribution)
    return {name: side for name, seen in found.items() if (side := _side(seen)) is not None}


def _side(seen: Sequence[BaseDistribution]) -> _Side | None:
    """Of one parameter; Optuna lets a range differ from trial to trial, so that the widest counts."""
    last = seen[-1]
    if isinstance(last, CategoricalDistribution):
        return _Side(0, 1, choices=tuple(last.choices), values=len(last.choices))
    ranges = [d for d in seen if isinstance(d, (FloatDistribution, IntDistribution))]
    if not ranges or not isinstance(last, (FloatDistribution, IntDistribution)):
        return None
    low, high = min(d.low for d in ranges), max(d.high for d in ranges)
    step = last.step or 0
    values = floor((high - low) / step + 1e-9) + 1 if step else 0
    if last.log and values:  # whole numbers, each as wide as it is sampled
        return _Side(log(low - 0.5), log(high + 0.5), log=True, values=values)
    return _Side(log(low), log(high), log=True) if last.log else _Side(low, high, values=values, step=step or 1.0)
