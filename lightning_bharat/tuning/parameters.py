"""One parameter of a search space: its distribution, and the conditions on which a point has it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from lightning_bharat.expressions import Expression, ExpressionError


class SpaceError(ValueError):
    """A search space that can't be searched; says which key is wrong, why, and what to write."""


@dataclass(frozen=True)
class When:
    """A parameter that is there only for some values of others.

    Args:
        condition: another parameter's key, which must be true, or an expression over keys, as in
            ``"model.kind == 'moe'"``. Where it names a parameter that is itself not there, it does not hold.
        distribution: Optuna's, or another ``When``, whose condition must hold too.
    """

    condition: str
    distribution: BaseDistribution | When


@dataclass(frozen=True)
class Parameter:
    """One key of a space.

    Attributes:
        distribution: Optuna's.
        conditions: all must hold.
    """

    distribution: BaseDistribution
    conditions: tuple[Expression, ...] = ()

    def is_there(self, values: Mapping[str, Any]) -> bool:
        """Whether a point with ``values`` has it."""
        return all(set(each.names) <= values.keys() and each.holds(values) for each in self.conditions)


def values_of(key: str, distribution: BaseDistribution) -> list[Any]:
    """All values of a distribution.

    Raises:
        SpaceError: it has no end of them.
    """
    match distribution:
        case CategoricalDistribution():
            return list(distribution.choices)
        case IntDistribution():
            return list(range(distribution.low, distribution.high + 1, distribution.step))
        case FloatDistribution(step=float() as step):
            low, exact = Decimal(str(distribution.low)), Decimal(str(step))
            return [float(low + i * exact) for i in range(round((distribution.high - distribution.low) / step) + 1)]
    raise SpaceError(f"{key}: {distribution} has no steps, so a grid has no points of it; write step or choices")


def parameter_of(key: str, given: BaseDistribution | When) -> Parameter:
    """What was given under ``key``.

    Raises:
        SpaceError: it can't be searched.
    """
    if not isinstance(key, str) or not all(part.isidentifier() for part in key.split(".")):
        raise SpaceError(f"{key!r} is no option's key; write it as on the command line, as in model.lr")
    conditions: list[Expression] = []
    while isinstance(given, When):
        conditions.append(expression_of(f"{key}: the condition", given.condition))
        given = given.distribution
    if not isinstance(given, (FloatDistribution, IntDistribution, CategoricalDistribution)):
        raise SpaceError(
            f"{key}: {given!r} is not a FloatDistribution, IntDistribution or CategoricalDistribution of Optuna"
        )
    _check_values(key, given)
    return Parameter(given, tuple(conditions))


def _check_values(key: str, distribution: BaseDistribution) -> None:
    """Refuse what Optuna takes, and no study can tell apart or draw from."""
    if isinstance(distribution, CategoricalDistribution):
        for number, choice in enumerate(distribution.choices):
            if not isinstance(choice, (bool, int, float, str, type(None))):
                raise SpaceError(f"{key}: choices: {choice!r} is not a number, a text, true, false or null")
            if choice in distribution.choices[:number]:
                raise SpaceError(f"{key}: choices: {choice!r} equals another one of {list(distribution.choices)}")
    elif not all(map(math.isfinite, (distribution.low, distribution.high))):  # type: ignore[attr-defined]
        raise SpaceError(f"{key}: {distribution} has no bounds; write finite ones")


def expression_of(what: str, text: str) -> Expression:
    """Of a condition or constraint.

    Raises:
        SpaceError: ``text`` is none; ``what`` says where it is.
    """
    try:
        return Expression(text)
    except ExpressionError as error:
        raise SpaceError(f"{what} {error}") from None
