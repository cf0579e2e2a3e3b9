"""What the runs have logged: their losses, step by step."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from examples.demo.run import Failed

Series = dict[int, float]  # of optimizer steps, from 0


@dataclass(frozen=True)
class Curve:
    """A run's losses: in training by step, and of the validation data after some of the steps."""

    training: Series
    validation: Series

    @classmethod
    def read(cls, folder: Path) -> Curve:
        """What CSVLogger has written into ``folder``."""
        with (folder / "metrics.csv").open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))

        def column(name: str) -> Series:
            return {int(row["step"]): float(row[name]) for row in rows if row.get(name)}

        return cls(column("loss"), column("val_loss"))

    def then(self, rest: Curve) -> Curve:
        """This run, and the one that went on with it."""
        return Curve(self.training | rest.training, self.validation | rest.validation)


@dataclass(frozen=True)
class Comparison:
    """A run on several layouts and the same run on one process.

    Args:
        hybrid, single: both runs.
        changed: the first step on the second layout.
    """

    hybrid: Curve
    single: Curve
    changed: int

    def __post_init__(self) -> None:
        for ours, theirs in self._pairs():
            if not ours or ours.keys() != theirs.keys():
                odd = sorted(ours.keys() ^ theirs.keys())[:5]
                raise Failed(f"the two runs logged different steps: {odd or 'none at all'}; remove runs/demo")

    def differences(self) -> Series:
        """How far the training losses are apart, by step."""
        return {step: abs(loss - self.single.training[step]) for step, loss in self.hybrid.training.items()}

    def largest(self) -> tuple[float, float]:
        """The largest difference of the training and of the validation losses."""
        training, validation = (max(abs(ours[s] - theirs[s]) for s in ours) for ours, theirs in self._pairs())
        return training, validation

    def fall(self) -> tuple[float, float]:
        """The first and the last validation loss of the hybrid run."""
        values = [self.hybrid.validation[step] for step in sorted(self.hybrid.validation)]
        return values[0], values[-1]

    def check(self, tolerance: float, fall: float) -> None:
        """Refuse curves that do not show what they should.

        Args:
            tolerance: the largest difference of losses.
            fall: how much lower the last validation loss is than the first training loss, at least.

        Raises:
            Failed: they are further apart, or fall less.
        """
        apart = max(self.largest())
        if not apart <= tolerance:
            raise Failed(f"the hybrid run's losses are up to {apart:.2g} from those of one process")
        start, end = self.hybrid.training[0], self.fall()[1]
        if not start - end >= fall:
            raise Failed(f"the validation loss has not clearly fallen: from {start:.3f} to {end:.3f}")

    def _pairs(self) -> list[tuple[Series, Series]]:
        return [
            (self.hybrid.training, self.single.training),
            (self.hybrid.validation, self.single.validation),
        ]
