"""Ranks that start in a fraction of a second: a process server with torch and Lightning imported forks them.

    >>> server = WarmServer()
    >>> server.run(function, 2, argument)           # doctest: +SKIP
    [what rank 0 returned, what rank 1 returned]

Engine: :mod:`multiprocessing`'s fork server. It imports and forks, nothing else: it must never touch an accelerator,
start a thread or run an operator, since what it started a fork would break.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from lightning_bharat.cluster.outcome import RanksFailed
from lightning_bharat.cluster.warm_job import Answer, WarmJob

PRELOAD = ("torch", "lightning.pytorch", "lightning_bharat.cluster.rank_main")
Call = tuple[str, bytes]  # the function's name, and it with its arguments, pickled


class WarmServer:
    """Starts jobs of ranks on this host from a process that has already imported ``preload``.

    A Python process has one fork server: the first :class:`WarmServer` decides what it preloads, and it ends with the
    process that started it.

    Args:
        preload: modules that it imports, if they are installed.
    """

    def __init__(self, preload: Sequence[str] = PRELOAD) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(preload))

    def warm_up(self) -> None:
        """Begin the imports now, in the background; the first job waits for them."""
        with _environment({"OMP_NUM_THREADS": "1"}):
            forkserver.ensure_running()

    def fork(self, target: Callable, *args: Any) -> tuple[Any, Connection]:
        """A process that calls ``target(channel, *args)``, and the channel's other end."""
        self.warm_up()
        here, there = self._context.Pipe()
        with there:
            (process := self._context.Process(target=target, args=(there, *args))).start()
        return process, here

    def start(
        self,
        function: Callable,
        ranks: int,
        *args: Any,
        env: Mapping[str, str] | None = None,
        answer: Answer | None = None,
        outputs: Path | None = None,
        grace: float = 5,
    ) -> WarmJob:
        """Fork ``ranks`` ranks that call ``function(*args)``, and return at once.

        Each rank has torchelastic's environment (``RANK``, ``WORLD_SIZE``, ``MASTER_PORT``, …, a port that was free),
        one thread, gloo on the loopback, this process's working directory and environment, and ``env`` on top.

        Args:
            function: importable by name (at a module's top level), like every argument's class.
            answer: called with a rank and what it asks by :func:`rank_main.ask`; it returns the answers that can be
                given now, each with the rank that waits for it.
            outputs: a folder in which what each rank writes stays, as ``rank0.log``, …
            grace: seconds that the others get to end by themselves after the first rank failed.

        Raises:
            TypeError: ``function`` or an argument can't be pickled.
        """
        return self.start_call(call_of(function, *args), ranks, env or {}, answer, outputs, grace)

    def start_call(
        self,
        call: Call,
        ranks: int,
        env: Mapping[str, str],
        answer: Answer | None,
        outputs: Path | None,
        grace: float = 5,
    ) -> WarmJob:
        """As :meth:`start`, of a call that this process need not be able to import."""
        return WarmJob(self.fork, *call, ranks, env, answer, outputs, grace)

    def run(
        self,
        function: Callable,
        ranks: int,
        *args: Any,
        timeout: float = 60,
        grace: float = 5,
        env: Mapping[str, str] | None = None,
    ) -> list[Any]:
        """Call ``function(*args)`` on ``ranks`` ranks and return what each returned, in order of ranks.

        Args:
            timeout: seconds from the forks to the last end; then all stacks are taken and all ranks killed.
            grace: seconds that the others get to end by themselves after the first rank failed.

        Raises:
            RanksFailed: a rank raised, was killed, or was not ready in time.
        """
        job = self.start(function, ranks, *args, env=env, grace=grace)
        outcomes = job.wait(timeout)
        if not all(outcome.ok for outcome in outcomes):
            raise RanksFailed(job.name, outcomes)
        return [outcome.value for outcome in outcomes]


def call_of(function: Callable, *args: Any) -> Call:
    """A call as ranks are sent it.

    Raises:
        TypeError: ``function`` or an argument can't be pickled.
    """
    try:
        call = pickle.dumps((function, args, {}))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(
            f"a warm rank imports what it calls, and this can't be sent to it: {error}; define the function and "
            "its arguments' classes at the top level of a module"
        ) from error
    return getattr(function, "__qualname__", str(function)), call


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Variables that a process started in this block finds set."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
