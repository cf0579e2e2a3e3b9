"""A replica group under torchft that is stopped and woken. It waits for limits of seconds, which a busy machine breaks.

python -m pytest tests/faults/stopped_group.py        # as `make chaos`
"""

from __future__ import annotations

import signal
from datetime import timedelta
from pathlib import Path

from lightning_bharat import events
from tests.strategies.replica_groups import STEPS, lighthouse, start, value_of, wait_for
from tests.strategies.test_torchft import RUN, Dies, Waits, alive, check_together, went_on


class Stops(Dies):
    """Likewise, and is asked to go on."""

    signal = signal.SIGSTOP


def test_a_group_that_was_stopped_comes_back(tmp_path: Path) -> None:
    """It was left out, and goes on from where the other one is, behind samples of its own that no one has trained."""
    first, run = tmp_path / "first", {**RUN, "timeout": timedelta(seconds=8)}  # on a busy machine it starts slowly
    with lighthouse(1, "--heartbeat_timeout_ms=1000") as address:
        survivor = start(address, 0, first, Waits, 0, run)
        wait_for(lambda: events.read(first), "the first group's first step")
        stopped = start(address, 1, tmp_path / "second", Stops, 1, RUN)
        wait_for(lambda: went_on(first), "a step alone")
        stopped.kill(0, signal.SIGCONT)
        (tmp_path / "third").mkdir()
        (tmp_path / "third" / "begun").touch()
        ours, its = value_of(survivor), value_of(stopped)
    check_together(ours, its)
    assert alive(first)[-1] == 2 and len(its["losses"]) < STEPS
