"""The ranks of one attempt on this host, forked from the warm server: torchelastic's logs, none of its imports."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import LogsSpecs, PContext
from torch.distributed.elastic.multiprocessing.api import RunProcsResult
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from lightning_bharat.cluster import rank_script
from lightning_bharat.cluster.failure import RankEnd
from lightning_bharat.cluster.heartbeat import NO_STEP, Pulse, run_of
from lightning_bharat.cluster.rank_script import HEARTBEAT, Orders, Script
from lightning_bharat.cluster.warm import WarmServer


class Bench:
    """Ranks that wait for orders, so that an attempt need not wait for them.

    Args:
        server: forks them.
    """

    def __init__(self, server: WarmServer) -> None:
        self._server = server
        self._waiting: list[tuple[Any, Connection]] = []

    def warm_up(self) -> None:
        """Begin the imports, in the background."""
        self._server.warm_up()

    def fill(self, ranks: int) -> None:
        """Let ``ranks`` wait."""
        self._waiting = [spare for spare in self._waiting if spare[0].is_alive()]
        while len(self._waiting) < ranks:
            self._waiting.append(self._server.fork(rank_script.main))

    def take(self) -> tuple[Any, Connection]:
        """A rank's process, and the channel for its orders."""
        while self._waiting:
            process, channel = self._waiting.pop()
            if process.is_alive():
                return process, channel
        return self._server.fork(rank_script.main)

    def clear(self) -> None:
        """Send all home."""
        for process, channel in self._waiting:
            channel.close()
            process.kill()
            process.join()
        self._waiting = []


class WarmRanks(PContext):
    """torchelastic's context of processes, whose streams and log files it keeps.

    Args:
        bench: from which ranks are taken.
        script: what they run.
        envs: variables of each, by local rank.
        ranks: global ranks, by local rank.
    """

    def __init__(
        self,
        bench: Bench,
        script: Script,
        envs: dict[int, dict[str, str]],
        ranks: Mapping[int, int],
        logs_specs: LogsSpecs,
        prefixes: dict[int, str],
        name: str,
    ) -> None:
        super().__init__(
            name, script.name, dict.fromkeys(envs, ()), envs, logs_specs, prefixes if any(prefixes.values()) else None
        )
        self._bench, self._script, self._ranks = bench, script, ranks
        self.folder = Path(tempfile.mkdtemp(prefix="bharat-"))
        self._processes: dict[int, Any] = {}
        self._channels: dict[int, Connection] = {}
        self._ends: dict[int, RankEnd] = {}
        self._closed = False

    # ---- torchelastic's side

    def _start(self) -> None:
        for local, environment in self.envs.items():
            folder = self.folder_of(local)
            folder.mkdir()
            every = {**os.environ, **environment}
            orders = Orders(self._script, every, os.getcwd(), str(folder), self.stdouts[local], self.stderrs[local])
            process, channel = self._bench.take()
            self._processes[local], self._channels[local] = process, channel
            with suppress(OSError):  # it has died: its end will be seen
                channel.send_bytes(orders.to_bytes())

    def _poll(self) -> RunProcsResult | None:
        """``None`` while all goes well and goes on."""
        self.look(0)
        if len(self._ends) < self.nprocs:
            return None
        return RunProcsResult(return_values=dict.fromkeys(range(self.nprocs)))

    def pids(self) -> dict[int, int]:
        """Process ids, by local rank."""
        return {local: process.pid for local, process in self._processes.items()}

    def _close(self, death_sig: signal.Signals, timeout: int = 30) -> None:
        """Send ``death_sig`` to all ranks; kill what is left ``timeout`` seconds later, with all that it has started.

        One that ends badly meanwhile leaves the others waiting for it: then all are killed.
        """
        if self._closed:
            return
        self._closed = True
        if death_sig != signal.SIGKILL:
            for process in self._processes.values():
                _send(process, death_sig)
            deadline = time.monotonic() + timeout
            while len(self._ends) < len(self._processes) and (left := deadline - time.monotonic()) > 0:
                self.look(min(left, 1))
                if any(end.exit_code for end in self._ends.values()):
                    deadline = min(deadline, time.monotonic() + 1)
        for process in self._processes.values():
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            _send(process, signal.SIGKILL)  # it may not lead a group yet
            process.join(timeout)
        for channel in self._channels.values():
            channel.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    # ---- the launcher's side

    @property
    def ends(self) -> list[RankEnd]:
        """Of those that have ended."""
        return list(self._ends.values())

    @property
    def running(self) -> dict[int, tuple[int, Path]]:
        """Process id and folder of the others, by global rank."""
        return {
            self._ranks[local]: (process.pid, self.folder_of(local))
            for local, process in self._processes.items()
            if local not in self._ends
        }

    def pulses(self) -> dict[int, Pulse]:
        """What each rank has last said, by global rank."""
        return {self._ranks[local]: Pulse.read(self.folder_of(local) / HEARTBEAT) for local in self._processes}

    def failures(self, ranks: Sequence[int]) -> dict[int, ProcessFailure]:
        """As torchelastic reports them, by global rank; of all, where ``ranks`` is empty."""
        local = {self._ranks[number]: number for number in self._processes}
        codes = {end.rank: end.exit_code for end in self.ends}
        return {
            rank: ProcessFailure(
                local[rank],
                self.pids()[local[rank]],
                codes.get(rank) or -signal.SIGKILL,
                self.error_files[local[rank]],
            )
            for rank in ranks or local
        }

    def reached(self) -> int:
        """Optimizer steps that are done on some rank; -1: not known."""
        return max((pulse.step for pulse in self.pulses().values()), default=NO_STEP)

    def got_on(self) -> float:
        """When a rank last got on, on the wall clock; now, where none says so."""
        last = max((pulse.progress for pulse in self.pulses().values() if pulse.step >= 0), default=0.0)
        return time.time() - (time.monotonic() - last if last else 0.0)

    def run_folder(self) -> Path | None:
        """The run's folder, once a rank has told it."""
        for local in self._processes:
            path = run_of(self.folder_of(local) / HEARTBEAT)
            with suppress(OSError):
                if text := path.read_text():
                    return Path(text)
        return None

    def folder_of(self, local: int) -> Path:
        """Where a rank writes its heartbeat and stacks."""
        return self.folder / str(local)

    def look(self, timeout: float) -> None:
        """Wait until a rank ends, ``timeout`` seconds at most, and note how."""
        running = {process.sentinel: local for local, process in self._processes.items() if local not in self._ends}
        for sentinel in wait(list(running), timeout):
            self._note(running[sentinel])

    def _note(self, local: int) -> None:
        process, channel, rank = self._processes[local], self._channels[local], self._ranks[local]
        process.join()
        words: dict[str, Any] = {}
        with suppress(EOFError, OSError):  # it died without a word: its exit code says how
            if channel.poll():
                words = json.loads(channel.recv_bytes())
        step = Pulse.read(self.folder_of(local) / HEARTBEAT).step
        self._ends[local] = RankEnd(rank, process.exitcode, step=step, **words)


def _send(process: Any, signum: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(process.pid, signum)
