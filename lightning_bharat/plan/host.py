"""What this host lets its processes use: cores and memory, within the limits of control groups (cgroups) of version 2
and 1, as containers and batch systems set them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
MEMBER = Path("/proc/self/cgroup")
_NONE = 2**60  # version 1 writes such a number where there is no limit


def groups(controller: str, root: Path = ROOT, member: Path = MEMBER) -> list[Path]:
    """Folders of the control groups that this process is in, and of those above: each one's limits hold.

    Args:
        controller: "memory" or "cpu".
        root: where control groups are mounted.
        member: where the kernel tells in which groups the process is.
    """
    found = [root, root / controller]
    for line in _read(member).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "" or controller in controllers.split(","):
            top = root / controllers
            folder = top / path.lstrip("/")
            found += [folder, *(above for above in folder.parents if above.is_relative_to(top))]
    return list(dict.fromkeys(found))


def memory(root: Path = ROOT, member: Path = MEMBER) -> int:
    """Bytes that all processes of this host's group may hold together: the host's, or less by a group's limit."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([whole, *_limits(groups("memory", root, member))])


def cores(root: Path = ROOT, member: Path = MEMBER) -> float:
    """Cores that this process may use, by its affinity and by quotas of time."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([float(there), *_quotas(groups("cpu", root, member))])


def _limits(folders: list[Path]) -> Iterator[int]:
    for folder in folders:
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = _read(folder / name).strip()
            if text.isdigit() and 0 < int(text) < _NONE:
                yield int(text)


def _quotas(folders: list[Path]) -> Iterator[float]:
    for folder in folders:
        parts = (
            _read(folder / "cpu.max") or f"{_read(folder / 'cpu.cfs_quota_us')} {_read(folder / 'cpu.cfs_period_us')}"
        )
        if found := re.fullmatch(r"(\d+)\s+([1-9]\d*)", parts.strip()):  # "max", and -1 of version 1, are no limit
            yield int(found[1]) / int(found[2])


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
