"""The launcher's events of a run, which wait until a rank has said where the run's folder is."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from lightning_bharat import events


class Record:
    """Writes events to the run's folder.

    Args:
        folder: of the run; ``None``: a rank is going to tell.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._kept: list[tuple[str, dict[str, Any]]] = []

    @property
    def place(self) -> Path:
        """The run's folder; until one is known, the working directory."""
        return self.folder or Path.cwd()

    def note(self, kind: str, **facts: Any) -> None:
        """An event that happens now."""
        self._kept.append((kind, {"time": time.time(), **facts}))
        self._write()

    def settle(self, folder: Path | None) -> None:
        """Use ``folder`` if none was known."""
        self.folder = self.folder or folder
        self._write()

    def report(self, name: str, text: str) -> str:
        """Keep a long text beside the events; returns its path, or nothing where none is known yet."""
        if self.folder is None or not text:
            return ""
        path = self.folder / "failures" / f"{name}.txt"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n")
        except OSError:
            return ""
        return str(path)

    def _write(self) -> None:
        if self.folder is None:
            return
        try:
            while self._kept:
                events.append(self.folder, self._kept[0][0], **self._kept[0][1])
                self._kept.pop(0)
        except OSError as error:  # a full disk must not end what is there to survive it
            print(f"bharat launch: events of the run can't be written: {error}", file=sys.stderr)
