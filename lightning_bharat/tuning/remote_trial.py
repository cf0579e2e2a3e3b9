"""A trial as its ranks see it: what they ask goes through their pipe to the controller, which alone has the study."""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping, Sequence
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import BaseTrial

from lightning_bharat.cluster.rank_main import ask


class RemoteTrial(BaseTrial):
    """An ``optuna.Trial`` for every rank of a trial: rank 0 asks, and the others read what it was answered.

    So all ranks must ask the same things in the same order; one that does not gets an error that says what the two
    asked for. Reports, attributes and constraints of other ranks than 0 are not sent: they are the same.

    Args:
        number: of the trial.
        params: values that the controller has already chosen.
        user_attrs: what it was enqueued with.
    """

    def __init__(self, number: int, params: Mapping[str, Any], user_attrs: Mapping[str, Any]) -> None:
        self._number, self._params, self._user_attrs = number, dict(params), dict(user_attrs)
        self._distributions: dict[str, BaseDistribution] = {}
        self._constraints: dict[str, float] = {}
        self._start = datetime.datetime.now()
        self._first = int(os.environ.get("RANK", 0)) == 0
        self.pruned_at: int | None = None

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        """As ``optuna.Trial``."""
        return self._suggest(name, FloatDistribution(low, high, step=step, log=log))

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        """As ``optuna.Trial``."""
        return self._suggest(name, IntDistribution(low, high, step=step, log=log))

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """As ``optuna.Trial``."""
        return self._suggest(name, CategoricalDistribution(choices))

    def suggest_uniform(self, name: str, low: float, high: float) -> float:
        """Deprecated in Optuna: :meth:`suggest_float`."""
        return self.suggest_float(name, low, high)

    def suggest_loguniform(self, name: str, low: float, high: float) -> float:
        """Deprecated in Optuna: :meth:`suggest_float` with ``log=True``."""
        return self.suggest_float(name, low, high, log=True)

    def suggest_discrete_uniform(self, name: str, low: float, high: float, q: float) -> float:
        """Deprecated in Optuna: :meth:`suggest_float` with ``step=q``."""
        return self.suggest_float(name, low, high, step=q)

    def report(self, value: float, step: int) -> None:
        """An intermediate value, after ``step`` steps; rank 0's counts."""
        self._tell("report", value, step)

    def should_prune(self) -> bool:
        """Whether the controller's pruner ends this trial, by what was reported; the same on all ranks."""
        return _answer("should_prune")

    def cores(self) -> tuple[int, ...]:
        """Those that this trial is to run on from now; the same on all ranks. Empty: any."""
        return _answer("cores")

    def note_resumed(self, reports: int) -> None:
        """This trial goes on from a checkpoint of the one that it retries, which had made so many reports by then."""
        self._tell("note_resumed", reports)

    def note_pruned(self, step: int) -> None:
        """This trial ends after ``step`` steps because :meth:`should_prune` said so."""
        self.pruned_at = step

    def set_user_attr(self, key: str, value: Any) -> None:
        """Keep ``value``, which JSON can hold, with the trial."""
        self._user_attrs[key] = value
        self._tell("set_user_attr", key, value)

    def set_constraint(self, key: str, value: float) -> None:
        """Measured for a constraint: it holds at 0 and below."""
        self._constraints[key] = value
        self._tell("set_constraint", key, value)

    @property
    def number(self) -> int:
        """Of the trial in its study."""
        return self._number

    @property
    def params(self) -> dict[str, Any]:
        """What was chosen so far."""
        return dict(self._params)

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """From which it was chosen in this process."""
        return dict(self._distributions)

    @property
    def user_attrs(self) -> dict[str, Any]:
        """What is kept with the trial."""
        return dict(self._user_attrs)

    @property
    def constraints(self) -> dict[str, float]:
        """What was measured for constraints."""
        return dict(self._constraints)

    @property
    def datetime_start(self) -> datetime.datetime:
        """When this process began with it."""
        return self._start

    def _suggest(self, name: str, distribution: BaseDistribution) -> Any:
        self._params[name] = _answer("suggest", name, distribution)
        self._distributions[name] = distribution
        return self._params[name]

    def _tell(self, what: str, *args: Any) -> None:
        if self._first:
            _answer(what, *args)


def _answer(what: str, *args: Any) -> Any:
    """What the controller answers.

    Raises:
        Exception: what was raised there, on every rank that asks.
    """
    error, answer = ask((what, args))
    if error is not None:
        raise error
    return answer
