"""Pressure on the host's memory, before the kernel ends a process for it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lightning_bharat.health.finding import Finding
from lightning_bharat.plan.host import groups

MOST_STALLED = 10.0  # percent of the last 10 s in which all work waited for memory
MOST_USED = 0.95  # of a limit

_LIMITS = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))  # cgroup v2, v1


@dataclass(frozen=True)
class Sources:
    """Where the kernel tells of memory.

    Attributes:
        pressure: stall information (Weiner, PSI, Linux 4.20).
        meminfo: of the host.
        groups: folders of control groups that this process is in.
    """

    pressure: Path = Path("/proc/pressure/memory")
    meminfo: Path = Path("/proc/meminfo")
    groups: tuple[Path, ...] = ()

    @classmethod
    def here(cls) -> Sources:
        """Of this process."""
        return cls(groups=tuple(groups("memory")))


class HostMemoryCheck:
    """Looks at stalls, control groups' limits, and what is available on the host."""

    def __init__(self, sources: Sources | None = None) -> None:
        self._sources = sources or Sources.here()
        self._said: set[str] = set()

    def look(self) -> list[Finding]:
        """What is wrong, each kind of it once until it is well again."""
        wrong = dict(self._wrong())
        new = [Finding("host_memory", words) for kind, words in wrong.items() if kind not in self._said]
        self._said = set(wrong)
        return new

    def _wrong(self) -> Iterator[tuple[str, str]]:
        stalled = re.search(r"full avg10=([\d.]+)", _read(self._sources.pressure))
        if stalled and float(stalled[1]) > MOST_STALLED:
            yield "stalls", f"all work waited for memory in {float(stalled[1]):.0f} % of the last 10 s"
        for folder in self._sources.groups:
            for most, used in _LIMITS:
                limit, now = _read(folder / most).strip(), _read(folder / used).strip()
                if limit.isdigit() and now.isdigit() and 0 < int(limit) < 2**60:
                    inactive = re.search(r"inactive_file (\d+)", _read(folder / "memory.stat"))
                    held = int(now) - (int(inactive[1]) if inactive else 0)  # the kernel gives pages of files back
                    if held > MOST_USED * int(limit):
                        yield str(folder), f"{held / 2**20:.0f} of {int(limit) / 2**20:.0f} MiB of {folder} are used"
        told = dict(re.findall(r"^(MemTotal|MemAvailable):\s+(\d+)", _read(self._sources.meminfo), re.MULTILINE))
        if len(told) == 2 and int(told["MemAvailable"]) < (1 - MOST_USED) * int(told["MemTotal"]):
            free, whole = (int(told[key]) / 2**10 for key in ("MemAvailable", "MemTotal"))
            yield "host", f"{free:.0f} of the host's {whole:.0f} MiB are available"


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
