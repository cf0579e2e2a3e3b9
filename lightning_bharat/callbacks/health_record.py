"""Where findings go: the events of the run, the log of the process, the Trainer's logger."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable
from pathlib import Path

import lightning.pytorch as pl

from lightning_bharat import events
from lightning_bharat.health.finding import Finding

_log = logging.getLogger("lightning_bharat.health")


class Record:
    """Takes findings from any thread.

    Args:
        folder: of the run.

    Attributes:
        counts: kinds that the Trainer's logger has not heard of yet.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.counts: deque[str] = deque()

    def write(self, findings: Iterable[Finding], action: str, step: int) -> None:
        """An event and a line of the log for each; the logger gets a count with the next batch."""
        ends = action in ("restart", "leave_node")
        for finding in findings:
            _log.warning("health: %s: %s (%s)", finding.kind, finding.message, action)
            self.counts.append(finding.kind)
            try:
                facts = {**finding.record(), "action": action, "step": step}
                events.append(self.folder, "failure" if ends else "health", **facts)
            except OSError as error:  # the disk may be what was found
                _log.warning("health: the event can't be written: %s", error)

    def to_logger(self, trainer: pl.Trainer, **values: float) -> None:
        """Give the Trainer's logger what has been found since the last time, and ``values``."""
        found: dict[str, float] = {}
        while self.counts:
            name = f"health/{self.counts.popleft()}"
            found[name] = found.get(name, 0) + 1
        found |= {f"health/{name}": value for name, value in values.items()}
        if found and trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics(found, step=trainer.global_step)
