"""A thread that looks around from time to time: memory, disks, devices, links, and who works longer than the others."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from math import inf
from pathlib import Path

import torch
import torch.distributed as dist

from lightning_bharat.health import leak
from lightning_bharat.health.device import DeviceCheck
from lightning_bharat.health.disk import DiskCheck
from lightning_bharat.health.finding import Finding
from lightning_bharat.health.host_memory import HostMemoryCheck
from lightning_bharat.health.links import LinkDetector, Responder, Tried, tried_in_turn
from lightning_bharat.health.progress import Progress
from lightning_bharat.health.straggler import StragglerDetector, WorkSampler

TICK = 0.25  # seconds from one look at the main thread to the next


@dataclass(frozen=True)
class Intervals:
    """Seconds from one look to the next.

    Attributes:
        memory: a sample of what this process holds; a leak needs 90.
        disk: also of devices and of the host's memory.
        work: a window in which ranks' work is compared.
        link: a pair; all pairs take as many turns as there are ranks.
    """

    memory: float = 1.0
    disk: float = 30.0
    work: float = 10.0
    link: float = 20.0


@dataclass
class _Due:
    every: float
    look: Callable[[], None]
    at: float = field(init=False)

    def __post_init__(self) -> None:
        self.at = time.monotonic() + self.every


class Prober:
    """Looks around in a thread of its own, which speaks to the store by a connection of its own.

    Args:
        kinds: what to look for.
        store: the rendezvous store; ``None`` on one process.
        rank: this rank; rank 0 compares what all found.
        world_size: number of ranks.
        name: a rank's name in messages.
        local_rank: of this host; its first rank looks at disks and memory.
        device: of this rank.
        folders: that the run writes to.
        progress: of the main thread.
        report: takes what is found, in this thread.
        intervals: between looks.
    """

    def __init__(
        self,
        kinds: Sequence[str],
        store: dist.Store | None,
        rank: int,
        world_size: int,
        name: Callable[[int], str],
        local_rank: int,
        device: torch.device,
        folders: Sequence[Path],
        progress: Progress,
        report: Callable[[Finding], None],
        intervals: Intervals | None = None,
    ) -> None:
        self.rank, self.world_size, self._name, self._report = rank, world_size, name, report
        self._device, self._progress, self._every = device, progress, intervals or Intervals()
        self._stopped = threading.Event()
        self._sampler: WorkSampler | None = None
        self._stragglers, self._links = StragglerDetector(name), LinkDetector(name)
        self._memory: dict[str, Callable[[], int]] = {"the process": leak.resident}
        if device.type != "cpu":
            self._memory[f"tensors on {device}"] = partial(leak.on_device, device)
        self._leaks = {what: leak.LeakDetector() for what in self._memory}
        self._window, self._step, self._turn = time.monotonic(), progress.step, 0
        self._seen: dict[int, str] = {}
        self._responder: Responder | None = None
        self._store = store.clone() if store is not None and world_size > 1 else None
        if self._store is not None:
            self._store.set_timeout(timedelta(seconds=30))
        self._dues = list(self._all_dues(kinds, local_rank, folders))
        self._thread = threading.Thread(target=self._run, name="health-probes", daemon=True)

    def _all_dues(self, kinds: Sequence[str], local_rank: int, folders: Sequence[Path]) -> list[_Due]:
        every, found = self._every, []
        if "leak" in kinds:
            found.append(_Due(every.memory, self._look_for_leaks))
        if "disk" in kinds and local_rank == 0:
            found.append(_Due(every.disk, partial(self._all_found, DiskCheck(folders).look)))
        if "host_memory" in kinds and local_rank == 0:
            found.append(_Due(every.disk, partial(self._all_found, HostMemoryCheck().look)))
        if "device" in kinds and self._device.type == "cuda":
            device = DeviceCheck(str(torch.cuda.get_device_properties(self._device).uuid))
            found.append(_Due(every.disk, partial(self._all_found, device.look)))
        if self._store is not None and "straggler" in kinds:
            self._sampler = WorkSampler(self._progress)
            found.append(_Due(every.work, self._compare_work))
        if self._store is not None and "link" in kinds:
            self._responder = Responder()
            found.append(_Due(every.link, self._try_link))
        return found

    def start(self) -> None:
        """Begin to look."""
        if self._store is not None:
            port = self._responder.port if self._responder else 0
            self._store.set(f"place/{self.rank}", json.dumps([_address(), port, os.uname().nodename]))
        if self._dues:
            self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(3)
        if self._responder is not None:
            self._responder.close()

    def _run(self) -> None:
        while not self._stopped.wait(self._seconds_to_next()):
            if self._sampler:
                self._sampler.look()
            now = time.monotonic()
            for due in self._dues:
                if now >= due.at:
                    due.at = now + due.every
                    with suppress(dist.DistError, OSError):  # the store has ended with the run, or a disk is gone
                        due.look()

    def _seconds_to_next(self) -> float:
        seconds = min(due.at for due in self._dues) - time.monotonic()
        return min(max(seconds, 0.0), TICK if self._sampler else inf)

    def _all_found(self, look: Callable[[], Iterable[Finding]]) -> None:
        for finding in look():
            self._found(finding)

    def _found(self, finding: Finding) -> None:
        rank = self.rank if finding.rank is None and finding.kind != "link" else finding.rank
        message = finding.message
        if finding.kind in ("leak", "disk", "host_memory", "device"):
            message = f"{self._name(self.rank)} on {finding.host}: {message}"
        self._report(Finding(finding.kind, message, rank, finding.host, finding.facts))

    def _look_for_leaks(self) -> None:
        for what, held in self._memory.items():
            used = held()
            if (each := self._leaks[what].look(used)) is not None:
                rate = 60 * each / self._every.memory / 2**20
                words = f"the memory of {what} grows by {rate:.0f} MiB a minute and holds {used / 2**20:.0f} MiB"
                self._found(Finding("leak", words, facts={"bytes": used}))

    # ---- among ranks: each writes what it found, rank 0 compares

    def _compare_work(self) -> None:
        assert self._store is not None and self._sampler is not None
        now, step = time.monotonic(), self._progress.step
        share, seconds, steps = self._sampler.share(), now - self._window, step - self._step
        self._window, self._step = now, step
        if steps:
            self._store.set(f"work/{self.rank}", json.dumps([time.time(), share * seconds / steps]))
        if self.rank == 0:
            told = {rank: json.loads(words) for rank, words in self._all_of("work").items()}
            fresh = {rank: work for rank, (at, work) in told.items() if time.time() - at < 2.5 * self._every.work}
            if len(fresh) == self.world_size:
                for finding in self._stragglers.look(fresh, self._hosts()):
                    self._found(finding)

    def _try_link(self) -> None:
        assert self._store is not None
        places = {rank: json.loads(words) for rank, words in self._all_of("place").items()}
        addresses = [tuple(places[rank][:2]) if rank in places else None for rank in range(self.world_size)]
        tried = tried_in_turn(self.rank, self._turn, addresses)
        self._turn += 1
        if tried is not None:
            self._store.set(f"link/{self.rank}", json.dumps([self._turn, tried.a, tried.b, tried.seconds]))
        if self.rank == 0:
            new = {rank: words for rank, words in self._all_of("link").items() if self._seen.get(rank) != words}
            self._seen.update(new)
            for finding in self._links.look([Tried(*json.loads(words)[1:]) for words in new.values()], self._hosts()):
                self._found(finding)

    def _all_of(self, what: str) -> dict[int, str]:
        assert self._store is not None
        there = [rank for rank in range(self.world_size) if self._store.check([f"{what}/{rank}"])]
        words = self._store.multi_get([f"{what}/{rank}" for rank in there]) if there else []
        return {rank: told.decode() for rank, told in zip(there, words, strict=True)}

    def _hosts(self) -> dict[int, str]:
        return {rank: json.loads(words)[2] for rank, words in self._all_of("place").items()}


def _address() -> str:
    """Where other hosts reach this one: the address from which it reaches the rendezvous."""
    master = os.environ.get("MASTER_ADDR", "127.0.0.1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
        probe.connect((master, 9))
        return probe.getsockname()[0]
    return "127.0.0.1"
