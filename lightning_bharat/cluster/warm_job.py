"""A job of warm ranks: it answers what they ask, and notes how each of them ends."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from lightning_bharat.cluster import rank_main
from lightning_bharat.cluster.outcome import RankOutcome

# Of a rank and its question: the answers that can be given now, each with the rank that waits for it.
Answer = Callable[[int, Any], Iterable[tuple[int, Any]]]
# Of a function and its arguments: a process that calls it with a channel first, and the channel's other end.
Fork = Callable[..., tuple[Any, Connection]]
NOT_BEGUN = (
    "it ended before it could begin; its error is in what this process writes. A rank imports the script that was "
    'started, as with multiprocessing: what the script does must stand under `if __name__ == "__main__":`'
)


class WarmJob:
    """Ranks that are running; made by ``WarmServer.start``, ended by :meth:`wait` or :meth:`finish`."""

    def __init__(
        self,
        fork: Fork,
        name: str,
        call: bytes,
        ranks: int,
        env: Mapping[str, str],
        answer: Answer | None,
        outputs: Path | None,
        grace: float,
    ) -> None:
        self.name = name
        self._answer, self._outputs, self._grace = answer, outputs, grace
        self._folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        self._outcomes = [RankOutcome(rank) for rank in range(ranks)]
        self._channels: dict[Connection, int] = {}
        self._processes: list[Any] = []
        port = free_port()
        for rank in range(ranks):
            folder = self._folder / str(rank)
            folder.mkdir()
            environment = {**os.environ, **rank_environment(rank, ranks, port), **env}
            process, here = fork(rank_main.main, call, environment, str(folder), str(self._output(rank)))
            self._channels[here] = rank
            self._processes.append(process)
        self._running = {process.sentinel: rank for rank, process in enumerate(self._processes)}
        self._answers = dict(self._channels)
        self._deadline: float | None = None
        self._began = time.monotonic()  # a server that is still importing takes nothing from the job's time

    @property
    def pids(self) -> list[int]:
        """Process ids, by rank."""
        return [process.pid for process in self._processes]

    @property
    def ranks(self) -> int:
        """How many there are."""
        return len(self._processes)

    @property
    def waitables(self) -> list[Any]:
        """For :func:`multiprocessing.connection.wait`: one is ready when :meth:`look` has something to see."""
        return [*self._running, *self._answers]

    @property
    def over(self) -> bool:
        """Whether all ranks have ended, or have had their time to after the first failure."""
        return not self._running or (self._deadline is not None and time.monotonic() >= self._deadline)

    def kill(self, rank: int, signum: int = signal.SIGKILL) -> None:
        """Send ``signum`` to one rank."""
        os.kill(self._processes[rank].pid, signum)

    def wait(self, timeout: float = 60) -> list[RankOutcome]:
        """Wait for all ranks, ``timeout`` seconds in all, and :meth:`finish`."""
        limit = self._began + timeout
        try:
            while not self.over and (left := min(limit, self._deadline or limit) - time.monotonic()) > 0:
                self.look(left)
        finally:
            outcomes = self.finish()
        return outcomes

    def look(self, timeout: float) -> None:
        """Wait ``timeout`` seconds at most until a rank asks, answers or ends, and note it."""
        for ready in wait(self.waitables, timeout=timeout):
            if ready in self._answers:
                self._read(ready, self._answers[ready])
            elif ready in self._running:
                self._ended(self._running.pop(ready))
        if not self._answers:
            self._let_go()
        if self._deadline is None and any(o.error or o.exit_code for o in self._outcomes):
            self._deadline = time.monotonic() + self._grace

    def finish(self) -> list[RankOutcome]:
        """How each rank ended; those that still run are late: their stacks are taken, and they are killed.

        Never raises for what happens in a rank. Leaves no process behind.
        """
        try:
            self._take_stacks()
        finally:
            self._end()
        return self._outcomes

    def reply(self, answers: Iterable[tuple[int, Any]]) -> None:
        """Send answers to ranks that wait for one."""
        channels = {rank: channel for channel, rank in self._channels.items()}
        for asker, answer in answers:
            with suppress(OSError):  # it has died meanwhile
                channels[asker].send_bytes(pickle.dumps(answer))

    def _read(self, channel: Connection, rank: int) -> None:
        outcome = self._outcomes[rank]
        try:
            kind, content = pickle.loads(channel.recv_bytes())  # our own child's bytes, through a pipe
        except (EOFError, ConnectionResetError):  # it died without a word: its exit code says how
            del self._answers[channel]
            return
        if kind == "ask":
            self.reply(self._answer(rank, content) if self._answer else ())
            return
        del self._answers[channel]
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
            while (now := _read_text(self._folder / str(outcome.rank) / rank_main.STACKS)) != stacks or not now:
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
            outcome.output = _read_text(self._output(outcome.rank))
            if (outcome.exit_code or 0) > 0 and not (self._folder / str(outcome.rank) / rank_main.STACKS).exists():
                outcome.error, outcome.message = "RuntimeError", NOT_BEGUN
        shutil.rmtree(self._folder, ignore_errors=True)

    def _output(self, rank: int) -> Path:
        return self._outputs / f"rank{rank}.log" if self._outputs else self._folder / str(rank) / "output"


def _read_text(path: Path) -> str:
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
