"""The stacks of ranks that do not get on, written by themselves: by faulthandler, in a signal's handler in C."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path

from lightning_bharat.cluster.rank_main import STACKS_SIGNAL

# Files of torch in which a rank stands that waits for others.
_COLLECTIVE = ("distributed_c10d.py", "torch/distributed/_functional_collectives", "c10d_logger.py")


def take(ranks: Mapping[int, tuple[int, Path]], stopped: Collection[int] = (), patience: float = 1.0) -> dict[int, str]:
    """Ask ranks for the stacks of all their threads. It leaves them stopped, or soon to be: for ranks that are killed
    next.

    A stopped process takes no signal: it is sent on its way with this one pending, which it takes first. The others are
    stopped before, so that nothing comes of what it may still do.

    Args:
        ranks: process id, and the file to which it writes them, by rank.
        stopped: those that are stopped.
        patience: seconds in which they may write.
    """
    running = {rank: there for rank, there in ranks.items() if rank not in stopped}
    found = _asked(running, (STACKS_SIGNAL,), patience)
    for pid, _ in running.values():
        _send(pid, signal.SIGSTOP)
    return found | _asked({rank: ranks[rank] for rank in stopped}, (STACKS_SIGNAL, signal.SIGCONT), patience)


def _asked(ranks: Mapping[int, tuple[int, Path]], signals: tuple[int, ...], patience: float) -> dict[int, str]:
    for pid, _ in ranks.values():
        for signum in signals:
            _send(pid, signum)
    deadline = time.monotonic() + patience
    found: dict[int, str] = {}
    while True:
        now = {rank: _text(path) for rank, (_, path) in ranks.items()}
        # While they are written, a part of them is there.
        if (all(now.values()) and now == found) or time.monotonic() > deadline:
            return now
        found = now
        time.sleep(0.05)


def _send(pid: int, signum: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signum)


def waits_for_others(stacks: str) -> bool:
    """Whether one of these threads stands in a collective."""
    return any(name in stacks for name in _COLLECTIVE)


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
