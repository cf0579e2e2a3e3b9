"""A trial's value from a distribution that is at hand as an object, by Optuna's public methods."""

from __future__ import annotations

from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import BaseTrial


def suggest(trial: BaseTrial, name: str, distribution: BaseDistribution) -> Any:
    """The value of ``name``, the same each time that this trial is asked.

    Raises:
        TypeError: ``distribution`` is none of Optuna's three.
        ValueError: the trial has it from another distribution.
    """
    match distribution:
        case FloatDistribution():
            return trial.suggest_float(
                name, distribution.low, distribution.high, step=distribution.step, log=distribution.log
            )
        case IntDistribution():
            return trial.suggest_int(
                name, distribution.low, distribution.high, step=distribution.step, log=distribution.log
            )
        case CategoricalDistribution():
            return trial.suggest_categorical(name, distribution.choices)
    raise TypeError(f"{name}: {distribution!r} is not a float, integer or categorical distribution of Optuna")
