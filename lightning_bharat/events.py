"""What happened to a run, one JSON line an event, kept beside its checkpoints: starts, saves, failures, ends.

Every process of a run appends to the same file; a line is written by one call of the kernel, so lines of several
processes never mix, and a torn last line (a machine that lost power) costs that line alone.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

EVENTS = "events.jsonl"


def append(folder: Path, kind: str, **facts: Any) -> None:
    """Add an event to those of the run in ``folder``.

    Args:
        kind: ``"start"``, ``"save"``, ``"load"``, ``"failure"``, ``"restart"``, ``"end"``, …
        facts: plain data; ``time`` (seconds since 1970) and ``host`` are added.

    Raises:
        OSError: the disk.
    """
    line = json.dumps({"time": time.time(), "host": os.uname().nodename, "kind": kind, **facts}) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / EVENTS, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def read(folder: Path) -> list[dict[str, Any]]:
    """All events of the run in ``folder``, in order of time; lines that are not whole are left out."""
    path = folder / EVENTS
    found = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and isinstance(event.get("time"), (int, float)) and "kind" in event:
            found.append(event)
    return sorted(found, key=lambda event: event["time"])
