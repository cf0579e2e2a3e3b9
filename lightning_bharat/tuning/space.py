"""What is searched: Optuna's distributions under LightningCLI's dotted keys, with conditions and constraints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.trial import BaseTrial

from lightning_bharat.expressions import unknown
from lightning_bharat.tuning import space_hints, space_yaml
from lightning_bharat.tuning.parameters import Parameter, SpaceError, When, expression_of, parameter_of, values_of
from lightning_bharat.tuning.suggest import suggest

__all__ = ["SearchSpace", "SpaceError", "When"]

# The controller gives each trial a folder of its own.
_NOT_SEARCHED = ("trainer.default_root_dir",)


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
        if not isinstance(parameters, Mapping) or not parameters:
            raise SpaceError("a search space without parameters; write what is searched, as in model.lr")
        if isinstance(constraints, str):
            raise SpaceError(f"constraints={constraints!r}: expected a list of expressions; write [{constraints!r}]")
        self.parameters, self.constraints = dict(parameters), tuple(constraints)
        parsed = {key: parameter_of(key, given) for key, given in self.parameters.items()}
        _check_keys(parsed)
        self._constraints = [expression_of("constraint", text) for text in self.constraints]
        self._parsed = _in_order(parsed)
        self._fixed: dict[str, Any] = {}

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Of all parameters, conditions left out, parents before children."""
        return {key: parameter.distribution for key, parameter in self._parsed.items()}

    @property
    def conditional(self) -> bool:
        """Whether some points lack some parameters."""
        return any(parameter.conditions for parameter in self._parsed.values())

    @property
    def outside(self) -> list[str]:
        """Options that expressions name and that are not searched, as long as :meth:`check` has not looked for them."""
        conditions = [each for parameter in self._parsed.values() for each in parameter.conditions]
        names = [name for each in (*conditions, *self._constraints) for name in each.names]
        return [name for name in dict.fromkeys(names) if name not in self._parsed and name not in self._fixed]

    def suggest(self, trial: BaseTrial) -> dict[str, Any]:
        """The trial's values of the parameters that it has, by key.

        Raises:
            SpaceError: a condition or constraint names what is neither searched nor known.
        """
        if self.outside:
            name = self.outside[0]
            raise SpaceError(f"an expression of the space names {unknown(name, self._parsed)}")
        values: dict[str, Any] = {}
        for key, parameter in self._parsed.items():
            if parameter.is_there({**self._fixed, **values}):
                values[key] = suggest(trial, key, parameter.distribution)
        return values

    def violated(self, values: Mapping[str, Any]) -> str | None:
        """The first constraint that a point breaks.

        Raises:
            ExpressionError: a constraint has no value there, as when it divides by zero.
        """
        known = {**self._fixed, **values}
        for constraint in self._constraints:
            if set(constraint.names) <= known.keys() and not constraint.holds(known):
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
        try:
            return cls(*space_yaml.read(Path(path)))
        except SpaceError as error:
            raise SpaceError(f"{path}: {error}") from None

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
        return cls(space_hints.read(kind, prefix))

    def check(self, words: Sequence[str]) -> None:
        """Compare with what ``bharat fit *words`` takes; builds neither module nor trainer.

        From then on conditions and constraints may name options that are not searched: they have the config's values.

        Raises:
            SpaceError: a key that is not an option, a value that the option does not take, or an option that ``words``
                set as well.
        """
        from lightning_bharat.tuning.space_check import check  # brings LightningCLI, which an objective does without

        self._fixed = check(self, words)

    def is_conditional(self, key: str) -> bool:
        """Whether some points lack this parameter."""
        return bool(self._parsed[key].conditions)

    def with_fixed(self, values: Mapping[str, Any]) -> SearchSpace:
        """The same space, in which options that are not searched have ``values``."""
        made = SearchSpace(self.parameters, self.constraints)
        made._fixed = dict(values)
        return made

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SearchSpace) and (self.parameters, self.constraints) == (
            other.parameters,
            other.constraints,
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"SearchSpace({self.parameters!r}, constraints={list(self.constraints)!r})"


def _check_keys(keys: Mapping[str, Any]) -> None:
    seen: dict[str, str] = {}
    for key in keys:
        if key in _NOT_SEARCHED:
            raise SpaceError(f"{key} can't be searched: each trial has a folder of its own")
        short = key.replace(".init_args", "")
        if short in seen:
            raise SpaceError(f"{key} and {seen[short]} are one option; leave out one of the two")
        seen[short] = key


def _in_order(parameters: Mapping[str, Parameter]) -> dict[str, Parameter]:
    """Parents before children, and a class before its arguments.

    Raises:
        SpaceError: conditions go round in a circle.
    """
    needed = {key: _needed(key, parameter, parameters) for key, parameter in parameters.items()}
    placed: dict[str, Parameter] = {}
    while left := [key for key in parameters if key not in placed]:
        ready = [key for key in left if needed[key] <= placed.keys()]
        if not ready:
            raise SpaceError(
                f"the conditions of {', '.join(left)} go round in a circle: each needs another of them first"
            )
        placed |= {key: parameters[key] for key in ready}
    return placed


def _needed(key: str, parameter: Parameter, parameters: Mapping[str, Parameter]) -> set[str]:
    named = {name for condition in parameter.conditions for name in condition.names if name in parameters}
    return named | {other for other in parameters if key.startswith(f"{other}.")}
