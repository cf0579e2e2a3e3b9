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
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from lightning_bharat.cluster import rank_main
from lightning_bharat.cluster.outcome import RankOutcome, RanksFailed

PRELOAD = ("torch", "lightning.pytorch", "lightning_bharat.cluster.rank_main")


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

    def start(self, function: Callable, ranks: int, *args: Any, env: Mapping[str, str] | None = None) -> WarmJob:
        """Fork ``ranks`` ranks that call ``function(*args)``, and return at once.

        Each rank has torchelastic's environment (``RANK``, ``WORLD_SIZE``, ``MASTER_PORT``, …, a port that was free),
        one thread, gloo on the loopback, this process's working directory and environment, and ``env`` on top.

        Args:
            function: importable by name (at a module's top level), like every argument's class.

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
        return WarmJob(self, getattr(function, "__qualname__", str(function)), call, ranks, env or {})

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
        job = self.start(function, ranks, *args, env=env)
        outcomes = job.wait(timeout, grace)
        if not all(outcome.ok for outcome in outcomes):
            raise RanksFailed(job.name, outcomes)
        return [outcome.value for outcome in outcomes]


class WarmJob:
    """Ranks that are running; made by :meth:`WarmServer.start`, ended by :meth:`wait`."""

    def __init__(self, server: WarmServer, name: str, call: bytes, ranks: int, env: Mapping[str, str]) -> None:
        self.name = name
        self._folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        self._outcomes = [RankOutcome(rank) for rank in range(ranks)]
        self._channels: dict[Connection, int] = {}
        self._processes: list[Any] = []
        port = free_port()
        for rank in range(ranks):
            folder = self._folder / str(rank)
            folder.mkdir()
            environment = {**os.environ, **rank_environment(rank, ranks, port), **env}
            process, here = server.fork(rank_main.main, call, environment, str(folder))
            self._channels[here] = rank
            self._processes.append(process)
        self._began = time.monotonic()  # a server that is still importing takes nothing from the job's time

    @property
    def pids(self) -> list[int]:
        """Process ids, by rank."""
        return [process.pid for process in self._processes]

    def kill(self, rank: int, signum: int = signal.SIGKILL) -> None:
        """Send ``signum`` to one rank."""
        os.kill(self._processes[rank].pid, signum)

    def wait(self, timeout: float = 60, grace: float = 5) -> list[RankOutcome]:
        """Wait for all ranks, ``grace`` seconds after the first failure, ``timeout`` seconds in all; then take
        stacks and kill the rest. Never raises for what happens in a rank. Leaves no process behind."""
        try:
            self._follow(self._began + timeout, grace)
            self._take_stacks()
        finally:
            self._end()
        return self._outcomes

    def _follow(self, deadline: float, grace: float) -> None:
        """Read answers until every process has ended or time is up."""
        running = {process.sentinel: rank for rank, process in enumerate(self._processes)}
        answers = dict(self._channels)
        failed = False
        while running and (left := deadline - time.monotonic()) > 0:
            for ready in wait([*running, *answers], timeout=left):
                if ready in answers:
                    self._read(ready, answers.pop(ready))
                elif ready in running:
                    self._ended(running.pop(ready))
            if not answers:
                self._let_go()
            if not failed and any(o.error or o.exit_code for o in self._outcomes):
                failed, deadline = True, min(deadline, time.monotonic() + grace)

    def _read(self, channel: Connection, rank: int) -> None:
        outcome = self._outcomes[rank]
        with suppress(EOFError, ConnectionResetError):  # it died without a word: its exit code says how
            kind, content = pickle.loads(channel.recv_bytes())  # our own child's bytes, through a pipe
            if kind == "value":
                outcome.value = content
            else:
                outcome.error, outcome.message, outcome.traceback = content

    def _ended(self, rank: int) -> None:
        self._processes[rank].join()
        self._outcomes[rank].exit_code = self._processes[rank].exitcode
        self._outcomes[rank].seconds = time.monotonic() - self._began

    def _let_go(self) -> None:
        for channel in self._channels:
            with suppress(OSError):
                channel.send_bytes(b"leave")

    def _take_stacks(self, patience: float = 2) -> None:
        late = [outcome for outcome in self._outcomes if outcome.exit_code is None]
        for outcome in late:
            outcome.timed_out, outcome.seconds = True, time.monotonic() - self._began
            with suppress(ProcessLookupError):
                self.kill(outcome.rank, rank_main.STACKS_SIGNAL)
        deadline = time.monotonic() + patience
        for outcome in late:
            stacks = ""  # while they are written, a part of them is there
            while (now := self._text(outcome.rank, "stacks")) != stacks or not now:
                stacks = now
                if time.monotonic() > deadline:
                    break
                time.sleep(0.2)
            outcome.stacks = stacks

    def _end(self) -> None:
        for process in self._processes:  # each rank leads a group, in which its loader's workers are
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            with suppress(ProcessLookupError):
                process.kill()
            process.join()
        for channel in self._channels:
            channel.close()
        for outcome in self._outcomes:
            outcome.output = self._text(outcome.rank, "output")
        shutil.rmtree(self._folder, ignore_errors=True)

    def _text(self, rank: int, name: str) -> str:
        path = self._folder / str(rank) / name
        return path.read_text(errors="replace") if path.exists() else ""


def rank_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """torchelastic's variables for one of ``ranks`` ranks on this host; Lightning takes them for torchrun's."""
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": f"warm-{port}",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
    }


def free_port() -> int:
    """A port that nobody listens on, below the range from which the kernel gives ports to outgoing connections."""
    for port in random.SystemRandom().sample(range(15000, 32000), 100):
        with socket.socket() as trial, suppress(OSError):
            trial.bind(("127.0.0.1", port))
            return port
    raise OSError("none of 100 ports between 15000 and 32000 is free on 127.0.0.1")


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
