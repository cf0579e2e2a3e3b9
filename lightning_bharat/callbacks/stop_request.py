"""What asks a run to stop: a signal, or the end of its time."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

TIME = 10_000  # in the place of a signal's number
LEAST_MARGIN = 60.0  # seconds before the end of a Slurm job; its processes get another half a minute or so


def signal_of(name: str | int) -> signal.Signals:
    """The signal of that name or number.

    Raises:
        ValueError: there is none, or it can't be caught.
    """
    try:
        found = signal.Signals[name] if isinstance(name, str) else signal.Signals(name)
    except (KeyError, ValueError):
        raise ValueError(f"{name!r} is no signal of this system; write for example 'SIGTERM' or 'SIGUSR1'") from None
    if found in (signal.SIGKILL, signal.SIGSTOP):
        raise ValueError(f"{found.name} can't be caught; write for example 'SIGTERM' or 'SIGUSR1'")
    return found


class StopRequest:
    """Listens for signals while a run trains, and looks at the clock.

    Lightning's handler of SIGTERM exchanges something between ranks as soon as the signal comes, in whatever they are
    doing, and so may leave them waiting for one another; this takes its place, and only makes a note.

    Args:
        signals: to listen for.
        time_limit: of the whole run from :meth:`start` on; ``None``: the end of the Slurm job, if there is one.
    """

    def __init__(self, signals: Iterable[str | int], time_limit: timedelta | None) -> None:
        self._signals, self._limit = [signal_of(name) for name in signals], time_limit
        self._heard = 0
        self._end: float | None = None
        self._least = 0.0
        self._former: dict[signal.Signals, Any] = {}

    def start(self) -> None:
        """Begin to listen; signals reach Python's main thread alone."""
        self._heard = 0
        if self._end is None and self._limit is not None:
            self._end = time.time() + self._limit.total_seconds()
        elif self._end is None and (end := slurm_end()) is not None:
            self._end, self._least = end, LEAST_MARGIN
        if threading.current_thread() is threading.main_thread():
            former = {number: signal.signal(number, self._hear) for number in self._signals}
            self._former |= {number: handler for number, handler in former.items() if handler != self._hear}

    def stop(self) -> None:
        """Give the signals back to whom they belonged."""
        former, self._former = self._former, {}
        for number, handler in former.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def asks(self, margin: float) -> int:
        """The number of a signal that came, :data:`TIME` if less than ``margin`` seconds are left, else 0."""
        if self._heard:
            return self._heard
        return TIME if self._end is not None and time.time() > self._end - max(margin, self._least) else 0

    def _hear(self, number: int, *_: object) -> None:
        self._heard = number


def in_words(asked: int) -> str:
    """What :meth:`StopRequest.asks` said, for people and for the record."""
    return "the end of its time" if asked == TIME else signal.Signals(asked).name


def slurm_end() -> float | None:
    """When this Slurm job ends, in seconds since 1970; ``None`` without one, or where it has no end."""
    if said := os.environ.get("SLURM_JOB_END_TIME"):
        with suppress(ValueError):
            return float(said)
    job = os.environ.get("SLURM_JOB_ID")
    if not job:
        return None
    try:
        shown = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"EndTime=(\S+)", shown)
    with suppress(ValueError):
        return datetime.fromisoformat(found[1]).timestamp() if found else None
    return None


def requeue(trainer: pl.Trainer) -> None:
    """Let Slurm start the job again, where Lightning would. A refusal is a warning."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    job = os.environ.get("SLURM_JOB_ID")
    if not (isinstance(environment, SLURMEnvironment) and environment.auto_requeue and job):
        return
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        rank_zero_warn(f"Slurm did not take job {job} into its queue again: {error}")
