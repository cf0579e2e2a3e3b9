"""A launcher in a process of its own, for as long as it is of use to wait for it."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

from benchmarks.moments import read

PATIENCE = 40.0  # seconds after the signal, when a restart of the peer counts as one that took this long
TO_START = 120.0  # seconds until a rank of the peer is struck


def waited(process: subprocess.Popen, moments: Path, is_ours: bool, timeout: float) -> int:
    """The exit code of ``process``, or -1 when it is of no use to wait longer; says how far it is.

    Args:
        moments: what ranks write (:func:`read`).
        is_ours: ``timeout`` counts from the start; else from the signal.
        timeout: seconds.
    """
    began = said = time.monotonic()
    while process.poll() is None:
        time.sleep(0.1)
        now, struck = time.monotonic(), [at for at, _, what in read(moments) if what == "struck"]
        if now - said > 10:
            said = now
            print(f"  {now - began:.0f} s, {len(struck)} signals", file=sys.stderr, flush=True)
        since, limit = (began, timeout) if is_ours else (struck[-1], timeout) if struck else (began, TO_START)
        if now - since > limit:
            return -1
    return process.returncode


def end(process: subprocess.Popen) -> None:
    """End a launcher and its ranks, which may be stopped, or wait for each other."""
    ranks: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        ranks = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(5)
    for each in ranks:
        with suppress(psutil.NoSuchProcess):
            each.kill()
    process.kill()
    process.wait()
