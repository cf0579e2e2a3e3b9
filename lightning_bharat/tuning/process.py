"""Which process holds a thing, in words that another process, another container and another host can judge."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ProcessId:
    """One process of one start: a process id alone is given again, and means nothing elsewhere.

    Args:
        host: The machine's name, for people.
        kernel: The boot of a kernel and the namespace of process ids: only where these are equal can ``pid`` be
            looked up. Empty where the system does not tell.
        pid: The process id.
        start: When it started, in clock ticks since boot; -1 where the system does not tell.
    """

    host: str
    kernel: str
    pid: int
    start: int

    @classmethod
    def own(cls) -> ProcessId:
        """The process that asks."""
        return cls.of(os.getpid())

    @classmethod
    def of(cls, pid: int) -> ProcessId:
        """A process of this host that lives now."""
        return cls(os.uname().nodename, _kernel(), pid, _look_up(pid)[1])

    @classmethod
    def read(cls, found: Any) -> ProcessId | None:
        """From what :meth:`as_dict` wrote; None if it is something else."""
        try:
            return cls(str(found["host"]), str(found["kernel"]), int(found["pid"]), int(found["start"]))
        except (TypeError, KeyError, ValueError):
            return None

    def as_dict(self) -> dict[str, Any]:
        """As JSON can write it."""
        return asdict(self)

    def can_be_seen(self) -> bool:
        """Whether this process can tell for certain if that one lives."""
        return bool(self.kernel) and self.kernel == _kernel()

    def is_dead(self) -> bool:
        """Whether it has ended for certain; a process that can't be seen from here is never said to be dead."""
        if not self.can_be_seen():
            return False
        state, start = _look_up(self.pid)
        return state in ("", "Z", "X") or start != self.start

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def _kernel() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _look_up(pid: int) -> tuple[str, int]:
    """The kernel's letter for its state, empty if there is none, and its start."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", -1
    return words[0], int(words[19])
