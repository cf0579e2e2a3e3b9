"""What the trials of a study do, and where they do it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_bharat.tuning.limits import Limit
from lightning_bharat.tuning.retry import MAX_RETRIES


@dataclass(frozen=True)
class Work:
    """What the trials of a study do.

    Attributes:
        folder: the study's.
        config: for ``bharat fit``; ``None``: an objective function runs.
        monitors: metrics that are a trial's values.
        seed: of the trials.
        prune: whether they are reported while a trial runs.
        limits: on what trials measure; they become constraints.
        max_retries: how often a trial that the machine ended is started again.
        idle_cores: whether the most promising trial gets the cores of idle workers.
        same_errors: how many trials one after another may end by one kind of error before the study does.
    """

    folder: Path
    config: Path | None
    monitors: Sequence[str]
    seed: int | None = None
    prune: bool = True
    limits: Sequence[Limit] = ()
    max_retries: int = MAX_RETRIES
    idle_cores: bool = False
    same_errors: int = 3

    def trial_folder(self, number: int) -> Path:
        """Where a trial's checkpoints, logs and output are."""
        return self.folder / "trials" / f"{number:04d}"
