"""A search space from the type hints of a class."""

from __future__ import annotations

import inspect
from enum import Enum
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from optuna.distributions import BaseDistribution, CategoricalDistribution

from lightning_bharat.tuning.parameters import SpaceError


def read(kind: type, prefix: str) -> dict[str, BaseDistribution]:
    """See ``SearchSpace.from_module``."""
    hints = get_type_hints(kind.__init__, include_extras=True)  # type: ignore[misc]
    found = {}
    for name in inspect.signature(kind).parameters:
        if (distribution := _distribution(hints.get(name))) is not None:
            found[f"{prefix}.{name}"] = distribution
    if not found:
        raise SpaceError(
            f"no type hint of {kind.__qualname__}.__init__ says what can be searched; write one, as in "
            "lr: Annotated[float, FloatDistribution(1e-5, 1e-1, log=True)]"
        )
    return found


def _distribution(hint: Any) -> BaseDistribution | None:
    """What a hint says; ``None``: a plain ``float`` or ``int`` has no bounds."""
    if get_origin(hint) is Annotated:
        return next((note for note in get_args(hint)[1:] if isinstance(note, BaseDistribution)), None)
    if hint is bool:
        return CategoricalDistribution([False, True])
    if get_origin(hint) is Literal:
        return CategoricalDistribution(get_args(hint))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return CategoricalDistribution([member.name for member in hint])  # as the command line has them
    return None
