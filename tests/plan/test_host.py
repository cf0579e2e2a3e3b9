"""What a host lets its processes use: by real limits where this machine lets them be set, and by the kernel's files."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lightning_bharat.plan import host

SAY = "import sys; sys.argv[0] = 'bharat'; from lightning_bharat.plan import host; print(host.memory(), host.cores())"
HERE = Path("/sys/fs/cgroup")


def test_this_machine() -> None:
    assert 0 < host.memory() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < host.cores() <= (os.cpu_count() or 1)


@contextmanager
def group(controller: str) -> Iterator[Path]:
    """A control group in a control group of this machine."""
    top = HERE if (HERE / "cgroup.controllers").exists() else HERE / controller
    outer = top / f"bharat-{uuid.uuid4().hex[:8]}"
    inner = outer / "inner"
    try:
        inner.mkdir(parents=True)
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        yield inner
    finally:
        inner.rmdir()
        outer.rmdir()


def set_limit(folder: Path, values: dict[str, str]) -> None:
    there = {name: value for name, value in values.items() if (folder / name).exists()}
    if not there:
        pytest.skip(f"{folder} has none of {', '.join(values)}")
    for name, value in there.items():
        (folder / name).write_text(value)


def said_in(folder: Path) -> tuple[int, float]:
    """What a process in this group says."""
    joined = f"echo $$ > {folder}/cgroup.procs && exec '{sys.executable}' -c \"{SAY}\""
    memory, cores = subprocess.run(["sh", "-c", joined], check=True, capture_output=True, text=True).stdout.split()
    return int(memory), float(cores)


def test_a_real_limit_of_memory_holds_for_groups_below() -> None:
    with group("memory") as inner:
        limit = {"memory.max": str(2**30), "memory.limit_in_bytes": str(2**30)}
        set_limit(inner.parent, limit)
        assert said_in(inner)[0] == 2**30


def test_a_real_quota_of_cores() -> None:
    with group("cpu") as inner:
        set_limit(inner, {"cpu.max": "50000 100000", "cpu.cfs_quota_us": "50000"})
        assert said_in(inner)[1] == 0.5


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux alone has it")
def test_affinity() -> None:
    first = min(os.sched_getaffinity(0))
    pinned = f"import os; os.sched_setaffinity(0, {{{first}}}); {SAY}"
    assert subprocess.check_output([sys.executable, "-c", pinned]).split()[1] == b"1.0"


@pytest.mark.parametrize(
    ("member", "files", "memory", "cores"),
    [
        ("0::/job/step\n", {"job/memory.max": "1000", "job/step/memory.max": "max", "job/cpu.max": "max 1"}, 1000, 99),
        ("0::/job/step\n", {"job/memory.max": "1000", "job/step/memory.max": "900", "job/cpu.max": "1 4"}, 900, 0.25),
        ("4:memory:/a\n1:cpu,cpuacct:/b\n", {"memory/a/memory.limit_in_bytes": "800"}, 800, 99),
        (
            "1:cpu,cpuacct:/b\n",
            {"cpu,cpuacct/b/cpu.cfs_quota_us": "5", "cpu,cpuacct/b/cpu.cfs_period_us": "10"},
            0,
            0.5,
        ),
        ("4:memory:/not/seen/in/here\n", {"memory/memory.limit_in_bytes": "700"}, 700, 99),  # a container of version 1
        (
            "4:memory:/a\n",
            {"memory/a/memory.limit_in_bytes": "9223372036854771712", "cpu/cpu.cfs_quota_us": "-1"},
            0,
            99,
        ),
        ("0::/job\n", {"job/memory.max": "many", "job/cpu.max": "4"}, 0, 99),
        ("", {}, 0, 99),
    ],
)
def test_files_of_the_kernel(tmp_path: Path, member: str, files: dict[str, str], memory: int, cores: float) -> None:
    (tmp_path / "member").write_text(member)
    for name, text in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    whole, every = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), len(os.sched_getaffinity(0))
    where = tmp_path / "groups", tmp_path / "member"
    assert host.memory(*where) == (memory or whole)
    assert host.cores(*where) == min(cores, every)
