"""``bharat launch`` in this process, whose warm server forks the ranks: a launch takes a few tenths of a second."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from typing import Any

from lightning_bharat import events
from lightning_bharat.commands import launch


@dataclass(frozen=True)
class Launched:
    """What is left of a launch: its exit code, and a folder with events and logs."""

    code: int
    folder: Path

    def output(self, rank: int = 0, attempt: int = 0) -> str:
        """Of one rank in one attempt: stdout, then stderr."""
        found = sorted((self.folder / "logs").glob(f"*/attempt_{attempt}/{rank}/*.log"), reverse=True)
        return "".join(path.read_text() for path in found)

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Those of one kind, in order of time."""
        return [event for event in events.read(self.folder) if event["kind"] == kind]


def launched(folder: Path, script: str, *options: str, ranks: int = 1, words: tuple[str, ...] = ()) -> Launched:
    """Launch ``script``, a text, with ``words`` after it."""
    path = folder / "script.py"
    path.write_text(dedent(script))
    return launched_words(folder, *options, f"--nproc-per-node={ranks}", str(path), *words)


def launched_words(folder: Path, *words: str) -> Launched:
    """``bharat launch`` with ``words``."""
    with as_before():
        code = launch.main(["--run", str(folder), "--redirects", "3", "--log-dir", str(folder / "logs"), *words])
    return Launched(code, folder)


@contextmanager
def as_before() -> Iterator[None]:
    """A launcher takes signals and sets variables, as the whole process that it is otherwise."""
    variables = dict(os.environ)
    handlers = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(variables)
        for name, handler in handlers.items():
            signal.signal(name, handler)
