"""Threads that see when this rank, or one that it watches, stands still; and one report with the stacks of all ranks.

They live beside the process group: they speak through connections of their own to the rendezvous store, so that a
collective that hangs does not stop them. A rank gives a sign of life (a *beat*) several times within the time that is
allowed. An *alarm* is raised by the first rank that sees

- its own main thread pass no hook for ``hang_seconds`` (``"hang"``), or
- no beat of a rank that it watches for ``silence_seconds`` (``"silent"``: stopped, its host down, or its link cut).

All ranks then write their stacks into the store; the one that raised the alarm collects them, says who is behind, and
writes the report; and all hear the verdict and do the same.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from lightning_bharat.health import stacks
from lightning_bharat.health.finding import Finding
from lightning_bharat.health.progress import Progress
from lightning_bharat.health.standstill import Standing, judged, report

ANSWER_SECONDS = 3.0  # for all ranks to write their stacks
Verdict = Callable[[Finding], None]


class Watcher:
    """Watches this rank's main thread and other ranks until :meth:`stop`.

    Args:
        store: the rendezvous store; ``None`` on one process.
        rank: this rank.
        name: a rank's name in messages.
        watched: other ranks whose beats this one looks at.
        world_size: number of ranks.
        progress: of this rank's main thread.
        hang_seconds: without a hook of the main thread.
        silence_seconds: without a beat.
        folder: for the report.
        verdict: called on each rank, in a thread, with the same finding.
        flight_record: what the backend remembers of its collectives, as text.
    """

    def __init__(
        self,
        store: dist.Store | None,
        rank: int,
        name: Callable[[int], str],
        watched: Sequence[int],
        world_size: int,
        progress: Progress,
        hang_seconds: float,
        silence_seconds: float,
        folder: Path,
        verdict: Verdict,
        flight_record: Callable[[], str] = str,
    ) -> None:
        self.rank, self.name, self.world_size, self.progress = rank, name, world_size, progress
        self.hang_seconds, self.silence_seconds = hang_seconds, silence_seconds
        self._watched, self._folder, self._verdict, self._flight_record = watched, folder, verdict, flight_record
        self._store = store.clone() if store is not None else None
        allowed = min(hang_seconds, silence_seconds) / 10
        self._interval = min(1.0 if self._store is not None else 3.0, allowed)  # alone it waits for nobody's stacks
        self._guards_every = min(3.0, allowed)
        if self._store is not None:
            self._store.set_timeout(timedelta(seconds=max(5.0, silence_seconds)))
        self._alarms = 0
        self._heard: dict[int, tuple[str, float]] = {}
        self._talked = time.monotonic()
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._talk, name="health-beats", daemon=True)]
        if self._store is not None:
            self._threads.append(threading.Thread(target=self._guard, name="health-guard", daemon=True))

    def start(self) -> None:
        """Begin to watch."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Watch nobody any more, and tell those who watch this rank."""
        if not self._stopped.is_set():
            self._stopped.set()
            self._threads[0].join(2 * self._interval + 1)

    # ---- the thread that talks to the store

    def _talk(self) -> None:
        try:
            while not self._stopped.wait(self._interval):
                self._beat()
                self._talked = time.monotonic()
                if self._store is not None and self._store.check([f"alarm/{self._alarms}"]):
                    self._answer(self._store)
                elif finding := self._look():
                    self._raise(finding)
            if self._store is not None:
                self._store.set(f"beat/{self.rank}", "left")
        except dist.DistError:  # the store has ended with the run, or its host is gone, which the guard sees
            return

    def _beat(self) -> None:
        if self._store is not None:
            self._store.set(f"beat/{self.rank}", f"{time.time()}")

    def _look(self) -> Finding | None:
        still = self.progress.still_for()
        if still > self.hang_seconds:
            return Finding("hang", f"no progress for {still:.1f} s", self.rank)
        for other in self._watched:
            silent = self._silent_for(other)
            if silent > self.silence_seconds:
                return Finding("silent", f"no sign of life for {silent:.1f} s", other)
        return None

    def _silent_for(self, other: int) -> float:
        assert self._store is not None
        now = time.monotonic()
        if other not in self._heard and not self._store.check([f"beat/{other}"]):
            return 0.0  # it has not begun
        beat = self._store.get(f"beat/{other}").decode()
        before, since = self._heard.get(other, ("", now))
        if beat != before or beat == "left":
            since = now
        self._heard[other] = beat, since
        return now - since

    # ---- an alarm

    def _raise(self, why: Finding) -> None:
        if self._store is None:
            standing = self._standing()
            self._end_alarm(self._written(why, {self.rank: standing}))
            return
        first = self._store.compare_set(f"alarm/{self._alarms}", "", json.dumps([self.rank, why.kind, why.message]))
        if json.loads(first)[0] != self.rank:
            self._answer(self._store)
            return
        self._tell_standing(self._store)
        standings, deadline = dict[int, Standing](), time.monotonic() + ANSWER_SECONDS
        while len(standings) < self.world_size and time.monotonic() < deadline:
            for other in range(self.world_size):
                key = f"standing/{self._alarms}/{other}"
                if other not in standings and self._store.check([key]):
                    standings[other] = Standing(**json.loads(self._store.get(key)))
            self._talked = time.monotonic()
            time.sleep(0.02)
        found = self._written(why, standings)
        self._store.set(
            f"verdict/{self._alarms}", json.dumps([found.kind, found.message, found.rank, found.host, found.facts])
        )
        self._end_alarm(found)

    def _answer(self, store: dist.Store) -> None:
        """Another rank has raised an alarm."""
        by, kind, message = json.loads(store.get(f"alarm/{self._alarms}"))
        self._tell_standing(store)
        deadline, key = time.monotonic() + 2 * ANSWER_SECONDS, f"verdict/{self._alarms}"
        while not store.check([key]):
            self._talked = time.monotonic()
            if time.monotonic() > deadline:
                self._end_alarm(Finding(kind, f"{self.name(by)} saw {message}, and is silent itself since", by))
                return
            time.sleep(0.02)
        kind, message, rank, host, facts = json.loads(store.get(key))
        self._end_alarm(Finding(kind, message, rank, host, facts))

    def _end_alarm(self, found: Finding) -> None:
        self._alarms += 1
        self.progress.at = self._talked = time.monotonic()  # if the run goes on, the time begins anew
        self._heard.clear()
        self._verdict(found)

    def _tell_standing(self, store: dist.Store) -> None:
        mine = self._standing()
        store.set(f"standing/{self._alarms}/{self.rank}", json.dumps(vars(mine)))

    def _standing(self) -> Standing:
        thread = self.progress.thread
        return Standing(
            os.uname().nodename,
            os.getpid(),
            self.progress.count,
            self.progress.phase,
            self.progress.step,
            stacks.innermost(thread),
            stacks.is_in_collective(thread),
            stacks.of_this_process(),
            self._flight_record(),
        )

    def _written(self, why: Finding, standings: dict[int, Standing]) -> Finding:
        pids = self._pids()
        found = judged(why, standings, self.world_size, self.name, pids)
        path = self._folder / f"{found.kind}-{time.strftime('%Y%m%d-%H%M%S')}-{self._alarms}.txt"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            path.write_text(report(found, standings, self.world_size, self.name, pids))
        except OSError as error:
            return Finding(found.kind, f"{found.message}; the report can't be written: {error}", found.rank, found.host)
        return Finding(found.kind, f"{found.message}; stacks of all ranks: {path}", found.rank, found.host)

    def announce(self) -> None:
        """Tell the others where this rank runs. Before :meth:`start`."""
        if self._store is not None:
            self._store.set(f"at/{self.rank}", json.dumps([os.uname().nodename, os.getpid()]))
            self._beat()

    def _pids(self) -> dict[int, tuple[str, int]]:
        found = {self.rank: (os.uname().nodename, os.getpid())}
        if self._store is not None:
            for other in range(self.world_size):
                if self._store.check([f"at/{other}"]):
                    host, pid = json.loads(self._store.get(f"at/{other}"))
                    found[other] = host, pid
        return found

    # ---- the thread that sees that the store does not answer

    def _guard(self) -> None:
        while not self._stopped.wait(self._guards_every):
            silent = time.monotonic() - self._talked
            if silent > self.silence_seconds + self._interval and self._threads[0].is_alive():
                host = self.name(0) if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" else "the launcher"
                words = f"the store of {host} has not answered for {silent:.1f} s: it is stopped, or its host or link"
                self._verdict(Finding("silent", f"{words} is down", 0, facts={"ranks": [0]}))
                return
