"""The hosts that a run does without: a file in its folder, which people may edit."""

from __future__ import annotations

import re
import time
from pathlib import Path

from lightning_bharat.cluster.failure import Failure

FILE = "bad_nodes.txt"
FAILURES, WITHIN = 3, 3600.0  # so many of a host's ranks, in so many seconds, are no accident
_ASKED = re.compile(r"leave out (.+?) and restart")  # HealthMonitor's


class BadNodes:
    """Of one run, as one host sees them.

    Args:
        host: this host's name.
    """

    def __init__(self, host: str) -> None:
        self.host = host
        self._failures: list[float] = []

    def refuse(self, folder: Path) -> str:
        """Why this host is not to take part, in words; empty: it may."""
        path = folder / FILE
        for line in path.read_text().splitlines() if path.is_file() else []:
            name, _, why = line.partition("\t")
            if name == self.host:
                return f"{self.host} is in {path}: {why.strip()}. Take its line out to use it again"
        return ""

    def judge(self, failure: Failure, folder: Path) -> str:
        """Put this host on the list if ``failure`` is one too many; returns why, or nothing.

        Failures count that began on this host and were not the program's.
        """
        asked = _ASKED.search(failure.words)
        if asked and self.host in asked[1].split(", "):
            return self._add(folder, failure.words)
        if not failure.ranks or failure.is_of_program or failure.cause == "health":
            return ""
        now = time.monotonic()
        self._failures = [at for at in self._failures if now - at < WITHIN] + [now]
        if len(self._failures) < FAILURES:
            return ""
        return self._add(folder, f"{FAILURES} of its ranks were lost within an hour, the last: {failure.words}")

    def _add(self, folder: Path, why: str) -> str:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / FILE).open("a") as file:
            file.write(f"{self.host}\t{time.strftime('%Y-%m-%d %H:%M:%S')}: {why}\n")
        return f"{self.host} is on the list of bad nodes: {why}"
