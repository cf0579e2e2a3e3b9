"""Folders that a run writes to: full, nearly full, or read-only."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from lightning_bharat.health.finding import Finding

LEAST_FREE = 0.02  # of a file system
LEAST_BYTES = 2**30  # where that is less than the share
_PROBE = os.urandom(4096)


class DiskCheck:
    """Asks how much is free, and writes and syncs a file of 4 KiB: quotas, inodes and read-only mounts show only there.

    Args:
        folders: where a run writes. Of a folder that is not there the nearest one above it is looked at.
    """

    def __init__(self, folders: Iterable[Path]) -> None:
        self.folders = list(dict.fromkeys(folders))
        self._said: set[tuple[Path, str]] = set()

    def look(self) -> Iterator[Finding]:
        """What is wrong, each thing once until it is well again."""
        for folder in self.folders:
            wrong = _wrong(_existing(folder))
            now = (folder, wrong.split(":")[0])
            if wrong and now not in self._said:
                yield Finding("disk", f"{folder}: {wrong}", facts={"folder": str(folder)})
            self._said = {entry for entry in self._said if entry[0] != folder} | ({now} if wrong else set())


def _wrong(folder: Path) -> str:
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".health-") as file:
            file.write(_PROBE)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return f"can't be written to: {error.strerror}"
    space = os.statvfs(folder)
    free, whole = space.f_bavail * space.f_frsize, space.f_blocks * space.f_frsize
    if whole and free < min(LEAST_FREE * whole, LEAST_BYTES):
        return f"nearly full: {free / 2**20:.0f} of {whole / 2**20:.0f} MiB are free"
    if space.f_files and space.f_favail < LEAST_FREE * space.f_files:
        return f"nearly out of inodes: {space.f_favail} of {space.f_files} are free"
    return ""


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    while not folder.is_dir() and folder.parent != folder:
        folder = folder.parent
    return folder
