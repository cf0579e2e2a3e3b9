"""Hyperparameter search over Trainer runs, with Optuna as the engine: the extra ``tune``."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_bharat.tuning.limits import Limit
    from lightning_bharat.tuning.run import tune
    from lightning_bharat.tuning.space import SearchSpace, When

__all__ = ["Limit", "SearchSpace", "When", "tune"]

# Imported when they are used: a callback asks `current` for its trial also where Optuna is not installed.
_HOMES = {"Limit": "limits", "SearchSpace": "space", "When": "space", "tune": "run"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
