"""One run at a time writes into a folder of checkpoints."""

from __future__ import annotations

import fcntl
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning_bharat.checkpoints.errors import CheckpointError

LOCK = ".lock"
PATIENCE = 10.0  # seconds that a killed process may take to give its memory back, and then the lock
_PF_EXITING = 4  # <linux/sched.h>


class FolderLock:
    """A lock on a folder that ends with the process, however it ends.

    A POSIX record lock: network file systems know it, and a loader's workers, which may outlive the process, do not
    inherit it. A second run in the same process has it, too.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: int | None = None

    def take(self) -> bool:
        """Take the lock, or wait for a process that is about to end; returns whether it was not held here before.

        Raises:
            CheckpointError: another run has it; names process and host.
        """
        if self._file is not None:
            return False
        self.folder.mkdir(parents=True, exist_ok=True)
        file = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        end = time.monotonic() + PATIENCE
        while not _locked(file):
            holder = _holder(file)
            if time.monotonic() > end or not _is_ending(holder):
                os.close(file)
                raise CheckpointError(
                    f"{self.folder} is written to by another run: process {holder.get('pid', 'unknown')} on "
                    f"{holder.get('host', 'another host')}. End that run, or give this one a folder of its own "
                    "(dirpath=..., default_root_dir=...)"
                )
            time.sleep(0.02)
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps({"pid": os.getpid(), "host": os.uname().nodename}).encode(), 0)
        self._file = file
        return True

    def release(self) -> None:
        """Let others write."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _locked(file: int) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _holder(file: int) -> dict[str, Any]:
    with suppress(ValueError):
        found = json.loads(os.pread(file, 1000, 0))
        return found if isinstance(found, dict) else {}
    return {}


def _is_ending(holder: dict[str, Any]) -> bool:
    """Whether the process has been killed, as far as can be seen from here."""
    if holder.get("host") != os.uname().nodename:
        return False
    try:
        words = Path(f"/proc/{int(holder['pid'])}/stat").read_text().rpartition(")")[2].split()
    except (OSError, KeyError, ValueError):
        return True
    return words[0] in "ZX" or bool(int(words[6]) & _PF_EXITING)
