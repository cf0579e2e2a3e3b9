"""How a trial is started: a group of ranks forked from the warm process server, which the controller can follow."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from lightning_bharat.cluster.outcome import RankOutcome
from lightning_bharat.cluster.warm import PRELOAD, WarmServer
from lightning_bharat.cluster.warm_job import Answer
from lightning_bharat.tuning.slots import Slot
from lightning_bharat.tuning.trial_run import Orders, run_config, run_objective

# Also what nearly every trial needs; the server imports and parses, so that it starts no thread and touches no device.
_PRELOAD = (*PRELOAD, "lightning_bharat.tuning.preload")


class Job(Protocol):
    """The ranks of a trial that runs; :class:`~lightning_bharat.cluster.warm_job.WarmJob` is one."""

    @property
    def ranks(self) -> int: ...

    @property
    def waitables(self) -> list[Any]: ...

    @property
    def over(self) -> bool: ...

    def look(self, timeout: float) -> None: ...

    def finish(self) -> list[RankOutcome]: ...


class Engine(Protocol):
    """Starts trials."""

    def warm_up(self) -> None: ...

    def start(self, orders: Orders, slot: Slot, answer: Answer) -> Job: ...

    def close(self) -> None: ...


class WarmEngine:
    """Trials on this host, each in fresh forks of a process that has imported what they need.

    Args:
        objective: a person's function; ``None``: a trial is a fit of the study's config.
        ranks: of a trial, by its values and where it runs.
    """

    def __init__(
        self, objective: Callable[[Any], float | Sequence[float]] | None, ranks: Callable[[Orders, Slot], int]
    ) -> None:
        self._objective, self._ranks = objective, ranks
        self._server = WarmServer(_PRELOAD)

    def warm_up(self) -> None:
        """Begin the imports, in the background."""
        self._server.warm_up()

    def start(self, orders: Orders, slot: Slot, answer: Answer) -> Job:
        """Start a trial's ranks; what they write stays in its folder."""
        ranks = self._ranks(orders, slot)
        function, args = (run_objective, (self._objective,)) if self._objective else (run_config, ())
        return self._server.start(
            function, ranks, orders, *args, env=slot.environment(ranks), answer=answer, outputs=orders.folder
        )

    def close(self) -> None:
        """Nothing: the server ends with this process."""


def host() -> str:
    """This machine's name."""
    return os.uname().nodename
