"""Which ranks this rank keeps an eye on, and how it sees that one of them died without a word.

On one host the kernel says so at once (a pidfd of the process becomes readable; nothing to tune and never wrong: a busy
or a stopped process is alive). Across hosts, and where there are no pidfds, each rank counts up in the store, and
silence for a long time means that it is gone.
"""

from __future__ import annotations

import json
import os
import select
import time
from contextlib import suppress
from pathlib import Path

from torch.distributed import Store


def watched_ranks(rank: int, world_size: int, local_size: int) -> list[int]:
    """The ranks that ``rank`` watches: on the first host rank 0, since the store ends with it; the next rank on its
    host, around; and the first of a host watches the first of the next host. So each rank is watched by another one,
    and the work does not grow with their number.

    >>> [watched_ranks(rank, 6, 3) for rank in range(6)]
    [[1, 3], [0, 2], [0], [4, 0], [5], [3]]
    """
    host = rank // local_size * local_size
    size = min(local_size, world_size - host)
    found = [0] if host == 0 else []
    found.append(host + (rank - host + 1) % size)
    if rank == host:
        found.append(host + local_size if host + local_size < world_size else 0)
    return [other for other in dict.fromkeys(found) if other != rank]


def announce(store: Store, rank: int) -> None:
    """Tell the others where this rank runs."""
    store.set(f"where/{rank}", json.dumps({"host": _host(), "pid": os.getpid()}))


class Neighbours:
    """The ranks that this one watches.

    Args:
        store: where ranks announce themselves and give signs of life.
        rank: this rank.
        world_size: number of ranks.
        local_size: ranks on each host.
        silence: seconds without a sign of life after which a rank that is not on this host is gone.
    """

    def __init__(self, store: Store, rank: int, world_size: int, local_size: int, silence: float) -> None:
        self._store = store
        self._rank = rank
        self._silence = silence
        self._next_beat = 0.0
        self._watched = {other: _Neighbour() for other in watched_ranks(rank, world_size, local_size)}

    def gone(self) -> tuple[int, str] | None:
        """A rank that has ended, and how, in words. Else gives a sign of life from time to time."""
        for rank, neighbour in self._watched.items():
            if how := self._look(rank, neighbour):
                return rank, how
        if time.monotonic() > self._next_beat:
            self._store.add(f"beat/{self._rank}", 1)
            self._next_beat = time.monotonic() + self._silence / 10
        return None

    def forget(self, rank: int) -> None:
        """Watch ``rank`` no longer."""
        self._watched.pop(rank).close()

    def close(self) -> None:
        """Watch nobody."""
        for rank in list(self._watched):
            self.forget(rank)

    @property
    def all_met(self) -> bool:
        """Whether it is known where each of them runs."""
        return all(neighbour.met for neighbour in self._watched.values())

    def _look(self, rank: int, neighbour: _Neighbour) -> str:
        if not neighbour.met:
            if not self._store.check([f"where/{rank}"]):
                return ""
            neighbour.meet(**json.loads(self._store.get(f"where/{rank}")))
        if neighbour.has_ended():
            return "its process ended without a word: killed, out of memory, or a crash in native code"
        if neighbour.is_local:
            return ""
        silent = neighbour.silent_for(self._store.add(f"beat/{rank}", 0))
        return f"no sign of life for {silent:.0f} s" if silent > self._silence else ""


class _Neighbour:
    """What is known of one other rank."""

    def __init__(self) -> None:
        self.met = False
        self.is_local = False
        self._pidfd: int | None = None
        self._beats, self._since = -1, 0.0

    def meet(self, host: str, pid: int) -> None:
        self.met = True
        self.is_local = host == _host() and hasattr(os, "pidfd_open")
        if self.is_local:
            with suppress(ProcessLookupError):  # it has ended already
                self._pidfd = os.pidfd_open(pid)

    def has_ended(self) -> bool:
        return self.is_local and (self._pidfd is None or bool(select.select([self._pidfd], [], [], 0)[0]))

    def silent_for(self, beats: int) -> float:
        if beats != self._beats:
            self._beats, self._since = beats, time.monotonic()
        return time.monotonic() - self._since

    def close(self) -> None:
        if self._pidfd is not None:
            os.close(self._pidfd)


def _host() -> str:
    """Equal for two processes whose process ids can be compared: the same boot of a kernel, the same namespace."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return os.uname().nodename
