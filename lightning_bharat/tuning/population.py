"""How a population is trained (Jaderberg et al. 2017): poor members go on from copies of good ones, explored."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lightning_bharat.tuning.generation import Unit
from lightning_bharat.tuning.options import nearest

Explorer = Literal["pbt", "pb2"]


@dataclass(frozen=True)
class Population:
    """How a population is trained.

    Attributes:
        size: members.
        interval: of a generation, in ``unit``; a member has as many as the trainer's ``max_epochs`` or ``max_steps``
            hold.
        mode: ``"sync"``: a generation begins when all members have ended the one before. ``"async"``: a member goes on
            at once, and is compared with those that have ended the same generation by then.
        unit: ``"epochs"`` or ``"steps"`` (optimizer steps).
        quantile: share of the members that is replaced, and from which it is copied.
        factors: by one of them each number is multiplied.
        resample: probability that a value is drawn anew instead.
        explore: keys whose values change; the others go with the weights. ``None``: all.
        explorer: ``"pbt"``: a copied member's values are near its donor's, by ``factors`` and ``resample``. ``"pb2"``:
            its numbers are chosen by what the generations so far have shown (Parker-Holder et al. 2020), which needs
            Ray; choices, conditional parameters and the first copies are explored as by ``"pbt"``.

    Raises:
        ValueError: a value that can't be, by name.
    """

    size: int
    interval: int
    mode: Literal["sync", "async"] = "async"
    unit: Unit = "epochs"
    quantile: float = 0.25
    factors: Sequence[float] = (0.8, 1.2)
    resample: float = 0.25
    explore: Sequence[str] | None = None
    explorer: Explorer = "pbt"

    def __post_init__(self) -> None:
        whole = {"size": (self.size, 2), "interval": (self.interval, 1)}
        for name, (value, least) in whole.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                why = "; one member has nobody to copy" if name == "size" and value == 1 else ""
                raise ValueError(f"population: {name}={value!r}: expected a whole number of at least {least}{why}")
        if self.mode not in ("sync", "async"):
            raise ValueError(f'population: mode={self.mode!r}: expected "sync" or "async"')
        if self.unit not in get_args(Unit):
            raise ValueError(f'population: unit={self.unit!r}: expected "epochs" or "steps"')
        if not _is_number(self.quantile) or not 0 < self.quantile <= 0.5:
            raise ValueError(f"population: quantile={self.quantile!r}: expected more than 0 and at most 0.5")
        factors = self.factors if isinstance(self.factors, (list, tuple)) else ()
        if not factors or not all(_is_number(factor) and factor > 0 for factor in factors):
            raise ValueError(f"population: factors={self.factors!r}: expected numbers above 0, such as [0.8, 1.2]")
        if not _is_number(self.resample) or not 0 <= self.resample <= 1:
            raise ValueError(f"population: resample={self.resample!r}: expected a probability, from 0 to 1")
        if self.explore is not None and (not isinstance(self.explore, (list, tuple)) or not self.explore):
            raise ValueError(f'population: explore={self.explore!r}: expected keys of the space, such as ["model.lr"]')
        if self.explorer not in get_args(Explorer):
            raise ValueError(f'population: explorer={self.explorer!r}: expected "pbt" or "pb2"')

    @classmethod
    def read(cls, given: Population | Mapping[str, Any]) -> Population:
        """What a user wrote.

        Raises:
            ValueError: a mapping with options that there are not, or without those that are needed.
        """
        if isinstance(given, Population):
            return given
        for name in given:
            if name not in cls.__dataclass_fields__:
                raise ValueError(f"population has no option {name!r}.{nearest(name, cls.__dataclass_fields__)}")
        for name in ("size", "interval"):
            if name not in given:
                raise ValueError(f'population={dict(given)!r} needs {name}: write {{"size": 4, "interval": 2}}')
        return cls(**given)

    def generations(self, length: int) -> int:
        """In a training of ``length`` epochs or steps; the last one may be shorter."""
        return math.ceil(length / self.interval)

    def end(self, generation: int, length: int) -> int:
        """Of a generation in such a training."""
        return min((generation + 1) * self.interval, length)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
