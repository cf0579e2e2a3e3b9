"""What the kernel says of a process, asked again and again."""

from __future__ import annotations

import os


class ProcFile:
    """A small file in ``/proc`` that is opened once: to look its name up costs more than to read it.

    Args:
        path: of a process or thread that is there for as long as it is read.
    """

    def __init__(self, path: str) -> None:
        self._path, self._file = path, -1

    def read(self) -> bytes:
        """What it says now.

        Raises:
            OSError: what it is about has ended.
        """
        if self._file < 0:
            self._file = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        return os.pread(self._file, 4096, 0)

    def __del__(self) -> None:
        if self._file >= 0:
            os.close(self._file)
