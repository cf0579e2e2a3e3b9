"""What is searched: Optuna's distributions under LightningCLI's dotted keys, with conditions and constraints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import BaseTrial

from lightning_bharat.expressions import Expression, ExpressionError, unknown
from lightning_bharat.tuning.suggest import suggest


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


class SearchSpace:
    """Options of a LightningCLI project that are searched.

        >>> space = SearchSpace(
        ...     {"model.moe": CategoricalDistribution([True, False]),
        ...      "model.experts": When("model.moe", IntDistribution(4, 16, step=4))})

    Args:
        parameters: a distribution of Optuna's, or a :class:`When`, under each key as the command line has it.
        constraints: expressions over keys that a point must hold to be run, such as
            ``"model.width * model.depth <= 4096"``. One that names a parameter that a point does not have does not
            apply to it.

    Attributes:
        parameters: what was given.
        constraints: what was given.

    Raises:
        SpaceError: a key, a distribution, a condition or a constraint can't be searched.
    """

    def __init__(self, parameters: Mapping[str, BaseDistribution | When], constraints: Sequence[str] = ()) -> None:
        if not parameters:
            raise SpaceError("a search space without parameters; write what is searched, as in model.lr")
        self.parameters, self.constraints = dict(parameters), tuple(constraints)
        parsed = {key: _parameter(key, given) for key, given in self.parameters.items()}
        self._constraints = [_expression("constraint", text, parsed) for text in self.constraints]
        for key, parameter in parsed.items():
            for condition in parameter.conditions:
                _check_names(f"{key}: the condition", condition, parsed)
        self._parsed = _in_order(parsed)

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Of all parameters, conditions left out, parents before children."""
        return {key: parameter.distribution for key, parameter in self._parsed.items()}

    @property
    def conditional(self) -> bool:
        """Whether some points lack some parameters."""
        return any(parameter.conditions for parameter in self._parsed.values())

    def suggest(self, trial: BaseTrial) -> dict[str, Any]:
        """The trial's values of the parameters that it has, by key."""
        values: dict[str, Any] = {}
        for key, parameter in self._parsed.items():
            if parameter.is_there(values):
                values[key] = suggest(trial, key, parameter.distribution)
        return values

    def violated(self, values: Mapping[str, Any]) -> str | None:
        """The first constraint that a point breaks.

        Raises:
            ExpressionError: a constraint has no value there, as when it divides by zero.
        """
        for constraint in self._constraints:
            if set(constraint.names) <= values.keys() and not constraint.holds(values):
                return constraint.text
        return None

    def grid(self) -> dict[str, list[Any]]:
        """All values of each parameter, for an exhaustive search.

        Raises:
            SpaceError: a range without steps has no end of them; or there are conditions, so that many points would be
                tried more than once.
        """
        if self.conditional:
            child = next(key for key, parameter in self._parsed.items() if parameter.conditions)
            raise SpaceError(
                f"{child} has a condition, and a grid would try the points without it again and again; write "
                'sampler="random", or one choice for each combination'
            )
        return {key: values_of(key, parameter.distribution) for key, parameter in self._parsed.items()}

    @classmethod
    def from_yaml(cls, path: str | Path) -> SearchSpace:
        """Read ``parameters:`` and ``constraints:`` from a file: see docs/tuning-space.md.

        Raises:
            SpaceError: names the file, the key and the reason.
            OSError: the file can't be read.
        """
        from lightning_bharat.tuning.space_yaml import read

        return read(Path(path))

    @classmethod
    def from_module(cls, kind: type, prefix: str = "model") -> SearchSpace:
        """What the type hints of ``kind.__init__`` say can be searched: ``bool``, ``Literal``, ``Enum``, and
        ``Annotated[float, FloatDistribution(1e-5, 1e-1, log=True)]``.

        Args:
            kind: a LightningModule's or LightningDataModule's class.
            prefix: what its options have before them on the command line: ``"model"`` or ``"data"``.

        Raises:
            SpaceError: none of its arguments can be searched.
        """
        from lightning_bharat.tuning.space_hints import read

        return read(kind, prefix)

    def check(self, words: Sequence[str]) -> None:
        """Compare with what ``bharat fit *words`` takes; builds neither module nor trainer.

        Raises:
            SpaceError: a key that is not an option, a value that the option does not take, or an option that ``words``
                set as well.
        """
        from lightning_bharat.tuning.space_check import check

        check(self, words)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SearchSpace) and (self.parameters, self.constraints) == (
            other.parameters,
            other.constraints,
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"SearchSpace({self.parameters!r}, constraints={list(self.constraints)!r})"


def values_of(key: str, distribution: BaseDistribution) -> list[Any]:
    """All values of a distribution.

    Raises:
        SpaceError: it has no end of them.
    """
    match distribution:
        case CategoricalDistribution():
            return list(distribution.choices)
        case IntDistribution(log=False):
            return list(range(distribution.low, distribution.high + 1, distribution.step))
        case FloatDistribution(step=float() as step):
            return [
                distribution.low + i * step for i in range(round((distribution.high - distribution.low) / step) + 1)
            ]
    raise SpaceError(f"{key}: {distribution} has no steps, so a grid has no points of it; write step or choices")


def _parameter(key: str, given: BaseDistribution | When) -> Parameter:
    if not isinstance(key, str) or not all(part.isidentifier() for part in key.split(".")):
        raise SpaceError(f"{key!r} is no option's key; write it as on the command line, as in model.lr")
    conditions: list[Expression] = []
    while isinstance(given, When):
        conditions.append(_expression(f"{key}: the condition", given.condition))
        given = given.distribution
    if not isinstance(given, (FloatDistribution, IntDistribution, CategoricalDistribution)):
        raise SpaceError(
            f"{key}: {given!r} is not a FloatDistribution, IntDistribution or CategoricalDistribution of Optuna"
        )
    return Parameter(given, tuple(conditions))


def _expression(what: str, text: str, known: Mapping[str, Any] | None = None) -> Expression:
    try:
        made = Expression(text)
    except ExpressionError as error:
        raise SpaceError(f"{what} {error}") from None
    if known is not None:
        _check_names(what, made, known)
    return made


def _check_names(what: str, expression: Expression, known: Mapping[str, Any]) -> None:
    for name in expression.names:
        if name not in known:
            raise SpaceError(f"{what} {expression.text!r} names {unknown(name, known)}")


def _in_order(parameters: Mapping[str, Parameter]) -> dict[str, Parameter]:
    """Parents before children.

    Raises:
        SpaceError: conditions go round in a circle.
    """
    placed: dict[str, Parameter] = {}
    left = dict(parameters)
    while left:
        ready = [key for key, each in left.items() if all(n in placed for c in each.conditions for n in c.names)]
        if not ready:
            raise SpaceError(
                f"the conditions of {', '.join(left)} go round in a circle: each needs another of them first"
            )
        for key in ready:
            placed[key] = left.pop(key)
    return placed
