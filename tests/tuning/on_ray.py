"""What runs on Ray in the tests."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil

from tests.tuning.tuned import Tuned


class Unlucky(Tuned):
    """Once, in the fifth step, it loses a process that its rank was started by.

    Args:
        loses: how far above the rank: 1 is the process that owns the fork server, 2 is Ray's worker.
    """

    def __init__(self, lr: float = 0.05, loses: int = 2) -> None:
        super().__init__(lr)
        self.loses = loses

    def come_into_trouble(self) -> None:
        """The third step is an ordinary one."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        if self.global_step == 4 and not (mark := Path("killed")).exists():
            mark.touch()
            os.kill(above()[self.loses].pid, signal.SIGKILL)
            time.sleep(60)  # seconds in which this process has to be ended
        return super().training_step(batch, batch_idx)


def above() -> list[psutil.Process]:
    """Of a rank: the fork server, the process that owns it, Ray's worker, and others."""
    found = psutil.Process().parents()
    assert "ray::" in found[2].cmdline()[0], found
    return found


def slow(trial: Any) -> float:
    """Says that it runs, and goes on."""
    Path(f"rank-{os.getpid()}").touch()
    time.sleep(60)
    return trial.suggest_float("x", 0, 1)
