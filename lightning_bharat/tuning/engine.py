"""How a trial is started: a group of ranks forked from the warm process server, which the controller can follow."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from lightning_bharat.cluster.outcome import RankOutcome
from lightning_bharat.cluster.warm import PRELOAD, Call, WarmServer, call_of
from lightning_bharat.cluster.warm_job import Answer
from lightning_bharat.tuning.slots import Slot, cuda_devices, slots
from lightning_bharat.tuning.trial_run import Orders, run_config, run_objective

Objective = Callable[[Any], "float | Sequence[float]"]

# Also what nearly every trial needs; the server imports and parses, so that it starts no thread and touches no device.
PRELOAD_OF_TRIALS = (*PRELOAD, "lightning_bharat.tuning.preload")


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

    def slots(self, workers: int) -> list[Slot]:
        """Where ``workers`` trials at a time run."""

    def warm_up(self) -> None: ...

    def start(self, orders: Orders, slot: Slot, answer: Answer) -> Job: ...

    def where(self, job: Job, slot: Slot) -> dict[str, Any]:
        """Where a trial runs, as far as it is known: the trial's attribute ``where``."""

    def close(self) -> None: ...


class WarmEngine:
    """Trials on this host, each in fresh forks of a process that has imported what they need.

    Args:
        objective: a person's function; ``None``: a trial is a fit of the study's config.
        ranks: of a trial, by its values and where it runs.
        on_cpu: whether trials use no other device.
    """

    def __init__(self, objective: Objective | None, ranks: Callable[[Orders, Slot], int], on_cpu: bool = False) -> None:
        self._objective, self._ranks, self._on_cpu = objective, ranks, on_cpu
        self._server = WarmServer(PRELOAD_OF_TRIALS)

    def slots(self, workers: int) -> list[Slot]:
        """This host's cores and devices, divided evenly."""
        return slots(workers, [] if self._on_cpu else cuda_devices())

    def warm_up(self) -> None:
        """Begin the imports, in the background."""
        self._server.warm_up()

    def start(self, orders: Orders, slot: Slot, answer: Answer) -> Job:
        """Start a trial's ranks; what they write stays in its folder."""
        ranks = self._ranks(orders, slot)
        call, env = call_of_trial(orders, self._objective), slot.environment(ranks)
        return self._server.start_call(call, ranks, env, answer, orders.folder)

    def where(self, job: Job, slot: Slot) -> dict[str, Any]:
        """Here."""
        return {"host": host(), "cores": slot.cores, "devices": slot.devices, "ranks": job.ranks}

    def close(self) -> None:
        """Nothing: the server ends with this process."""


def call_of_trial(orders: Orders, objective: Objective | None) -> Call:
    """What each rank of a trial calls."""
    return call_of(run_objective, orders, objective) if objective else call_of(run_config, orders)


def host() -> str:
    """This machine's name."""
    return os.uname().nodename
