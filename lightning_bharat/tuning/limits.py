"""Limits on what a trial measures: memory, latency, parameters. They are checked after the trial, unlike a constraint
of the space, which is checked before it.

A limit becomes a constraint of Optuna's (``trial.set_constraint``; 0 and below is kept) as the share by which it is
exceeded: samplers add up the constraints of a trial, and bytes and seconds add up in no other way.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Protocol

from lightning_bharat.tuning.options import nearest

PEAK_MEMORY = "peak_memory_bytes"
OUT_OF_MEMORY = "out_of_memory"

# A trial that ran out of memory needed more than the limit; how much more was never measured.
AT_LEAST_OVER = 0.1

_UNITS = {
    "": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate(("", "k", "M", "G", "T"))},
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate(("K", "M", "G", "T"), 1)},
    **{"us": 1e-6, "ms": 1e-3, "s": 1, "min": 60, "h": 3600},
}


class Constrained(Protocol):
    """What a trial must offer: Optuna's ``Trial`` does, and so does a trial's process here."""

    def set_constraint(self, key: str, value: float) -> None:
        """See ``optuna.Trial.set_constraint``."""


@dataclass(frozen=True)
class Limit:
    """The most of something that a trial may need.

    Args:
        name: what is measured: a user attribute of the trial (``peak_memory_bytes``, ``seconds``) or a metric that the
            module logs.
        at_most: a number, or a number with a unit: ``"2 GiB"``, ``"50 ms"``. Bytes and seconds are the base units.

    Raises:
        ValueError: no number above 0, or an unknown unit.
    """

    name: str
    at_most: float | str

    def __post_init__(self) -> None:
        _ = self.bound

    @property
    def bound(self) -> float:
        """``at_most`` as a number."""
        value = quantity(self.at_most)
        if not (isfinite(value) and value > 0):
            raise ValueError(f"Limit({self.name!r}, at_most={self.at_most!r}): expected a number above 0")
        return value

    def excess(self, measured: float) -> float:
        """The share by which ``measured`` is above the limit; negative below it."""
        return measured / self.bound - 1


def quantity(text: float | str) -> float:
    """A number with or without a unit of bytes or of time.

    >>> quantity("2 GiB"), quantity("50ms"), quantity(1e6)
    (2147483648.0, 0.05, 1000000.0)

    Raises:
        ValueError: not a number, or an unknown unit.
    """
    if not isinstance(text, str):
        return float(text)
    found = re.fullmatch(r"\s*([-+]?[\d_]*\.?\d+(?:[eE][-+]?\d+)?)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2] not in _UNITS:
        raise ValueError(f"{text!r}: expected a number, and one of the units {', '.join(filter(None, _UNITS))}")
    return float(found[1]) * _UNITS[found[2]]


def set_constraints(
    trial: Constrained, limits: Iterable[Limit], measured: Mapping[str, float | None], out_of_memory: bool = False
) -> None:
    """Tell the study how far a trial keeps its limits: before ``study.tell``, also of a trial that failed.

    Args:
        trial: a trial that runs.
        limits: those of the study.
        measured: the trial's user attributes and last metrics.
        out_of_memory: the trial failed for want of memory. Then its limit on ``peak_memory_bytes`` counts as exceeded,
            by a tenth at least; without such a limit it gets the constraint ``out_of_memory``.

    Raises:
        ValueError: a limit of which nothing was measured, though the trial did not run out of memory.
    """
    limits = sorted(limits, key=lambda limit: limit.name)
    for limit in limits:
        value = measured.get(limit.name)
        if out_of_memory and limit.name == PEAK_MEMORY:
            trial.set_constraint(limit.name, max(limit.excess(value or 0.0), AT_LEAST_OVER))
        elif value is not None:
            trial.set_constraint(limit.name, limit.excess(value))
        elif not out_of_memory:
            raise ValueError(
                f"Limit({limit.name!r}): the trial measured nothing of that name.{nearest(limit.name, measured)} "
                f"It has {', '.join(sorted(measured)) or 'nothing'}; log it in the module, or drop the limit"
            )
    if out_of_memory and all(limit.name != PEAK_MEMORY for limit in limits):
        trial.set_constraint(OUT_OF_MEMORY, 1.0)
