"""A process that owns a warm server, and is told through a connection which job to run: one at a time.

For a program whose own processes have threads, or run elsewhere. It is told, and says, pickled tuples: ``("start",
call, ranks, environment, outputs)``, ``("answers", [(rank, answer), …])`` and ``("stop",)``; ``("ask", rank,
question)`` and ``("end", outcomes)``. When the connection ends, its ranks and it do.
"""

from __future__ import annotations

import os
import pickle
import sys
from contextlib import suppress
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from multiprocessing.connection import Connection, wait
from types import ModuleType
from typing import Any

from lightning_bharat.cluster.warm import WarmServer
from lightning_bharat.cluster.warm_job import WarmJob

# The package imports torch where it is imported, other than in its command; here the server's own process does that.
COMMAND = "import sys; sys.argv[0] = 'bharat'; from lightning_bharat.cluster.warm_host import main; main()"


@dataclass(frozen=True)
class Program:
    """The program whose functions ranks call, as far as they need it to import them.

    Attributes:
        argv: its command line.
        path: where it imports from.
        module: its main module's name, where it was started by that (``python -m``).
        file: its main module's file.
        preload: modules that the server imports.
    """

    argv: tuple[str, ...]
    path: tuple[str, ...]
    module: str | None
    file: str | None
    preload: tuple[str, ...]

    @classmethod
    def own(cls, preload: tuple[str, ...]) -> Program:
        """The one that asks."""
        main = sys.modules["__main__"]
        module = getattr(getattr(main, "__spec__", None), "name", None)
        file = getattr(main, "__file__", None)
        return cls(tuple(sys.argv), tuple(sys.path), module, os.path.abspath(file) if file else None, preload)

    def enter(self) -> None:
        """Let what this process forks take it for its program, as :mod:`multiprocessing` does for its children."""
        sys.argv[:], sys.path[:] = self.argv, self.path
        main = ModuleType("__main__")
        if self.module is not None:
            main.__spec__ = ModuleSpec(self.module, None)
        elif self.file is not None and os.path.exists(self.file):
            main.__file__ = self.file
        sys.modules["__main__"] = main


class WarmHost:
    """Runs the jobs that it is told to.

    Args:
        channel: to who tells it.
        server: starts the ranks.
    """

    def __init__(self, channel: Connection, server: WarmServer) -> None:
        self._channel, self._server = channel, server
        self._job: WarmJob | None = None

    def run(self) -> None:
        """Until the connection ends."""
        server_works = True
        while server_works:
            job = self._job
            ready = wait([self._channel, *(job.waitables if job else ())], timeout=1.0 if job else None)
            if job:
                job.look(0)
            if self._channel in ready:
                server_works = self._hear()
            if self._job and self._job.over:
                self._end(self._job)

    def _hear(self) -> bool:
        """Do what is said; whether there is still somebody who says it."""
        try:
            what, *content = pickle.loads(self._channel.recv_bytes())  # from our own parent, through a pipe
        except (EOFError, OSError):
            if self._job:
                _kill(self._job)
            return False
        if what == "start":
            call, ranks, env, outputs = content
            self._job = self._server.start_call(call, ranks, env, self._ask, outputs)
        elif self._job is None:
            pass  # it has ended meanwhile
        elif what == "answers":
            self._job.reply(*content)
        elif what == "stop":
            self._end(self._job)
        return True

    def _ask(self, rank: int, question: Any) -> list[tuple[int, Any]]:
        """Answers come later."""
        self._say("ask", rank, question)
        return []

    def _end(self, job: WarmJob) -> None:
        self._job = None
        self._say("end", job.finish())

    def _say(self, *what: Any) -> None:
        with suppress(OSError):  # nobody listens any more; the next look for words ends this process
            self._channel.send_bytes(pickle.dumps(what))


def _kill(job: WarmJob) -> None:
    for rank in range(job.ranks):
        with suppress(ProcessLookupError):
            job.kill(rank)
    while not job.over:
        job.look(1.0)
    job.finish()


def main() -> None:
    """For :data:`COMMAND`, with the connection's file descriptor; the first thing that is said is a program, and the
    cores on which everything runs (none: any).
    """
    with Connection(int(sys.argv[1])) as channel:
        program, cores = pickle.loads(channel.recv_bytes())  # from our own parent, through a pipe
        program.enter()
        if cores:
            with suppress(OSError):  # a container that has others
                os.sched_setaffinity(0, cores)
        server = WarmServer(program.preload)
        server.warm_up()
        WarmHost(channel, server).run()
