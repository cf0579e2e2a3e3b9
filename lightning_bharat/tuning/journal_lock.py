"""The lock of a journal that several processes and hosts append to: whose holder is known, so that a dead one's is
taken at once."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import stat
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from optuna.storages.journal import JournalFileOpenLock

from lightning_bharat.tuning.process import ProcessId

GRACE = 10.0  # seconds that a holder who can't be seen from here may hold it: an append takes milliseconds
_WARN = 10.0  # seconds
_threads = threading.Lock()  # a record lock keeps processes apart, not threads
_logger = logging.getLogger(__name__)


class JournalLock(JournalFileOpenLock):
    """Optuna's exclusively created file, which names its holder.

    Optuna's own locks on the same journal (its dashboard, a plain worker) use the same file, so they keep each other
    out. Theirs take any lock after 30 s; this one

    * takes the lock of a process of this host that is dead, at once;
    * waits for one that lives, however long, and says for whom;
    * takes one of another host, or of Optuna's, that stayed the same for ``grace`` seconds of this host's own clock.

    Args:
        file: The journal.
        grace: Seconds, see above.
    """

    def __init__(self, file: Path, grace: float = GRACE) -> None:
        super().__init__(str(file), grace_period=None)
        self.path = Path(f"{file}.lock")
        self.grace = grace
        self._token = ""

    def acquire(self) -> bool:
        """Wait for the lock and take it."""
        token = json.dumps({**ProcessId.own().as_dict(), "token": uuid.uuid4().hex})
        pause, seen, since, warned = 0.001, "", time.monotonic(), time.monotonic()
        while not self._create(token):
            now, holder = time.monotonic(), self._holder()
            if holder != seen:
                seen, since, pause = holder, now, 0.001
            process = _process(holder)
            if process and process.can_be_seen():
                if process.is_dead():
                    self._take_away(holder)
            elif holder and now - since > self.grace:
                _logger.warning(f"{self.path}: taken, as its holder ({process or 'unknown'}) kept it {self.grace} s")
                self._take_away(holder)
            if now - warned > _WARN:
                _logger.warning(f"{self.path}: waiting for {process or 'its holder'} to let it go")
                warned = now
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
        return True

    def release(self) -> None:
        """Let it go, unless another has taken it meanwhile."""
        with self._guard():
            if self._holder() == self._token:
                self.path.unlink()
            else:
                _logger.warning(f"{self.path}: another process took it while this one held it")
        self._token = ""

    def _create(self, token: str) -> bool:
        self._token = token
        try:
            try:
                self._create_named(token.encode())
            except OSError as error:
                if isinstance(error, FileExistsError):
                    raise
                self._create_then_name(token.encode())
        except FileExistsError:
            return False
        return True

    def _create_named(self, token: bytes) -> None:
        """The name is in the file when it appears, so a kill never leaves a lock of nobody."""
        file = os.open(self.path.parent, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o644)
        try:
            os.write(file, token)
            # Only with a folder does Python pass on that the link is to be followed.
            os.link(f"/proc/self/fd/{file}", self.path, src_dir_fd=file, follow_symlinks=True)
        finally:
            os.close(file)

    def _create_then_name(self, token: bytes) -> None:
        """Where files can't be without a name (NFS): a kill between the two leaves a lock that has the grace."""
        file = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644)
        try:
            os.write(file, token)
        except OSError:  # a full disk: the lock holds without a name, too
            found = os.fstat(file)
            self._token = f"{found.st_ino} {found.st_mtime_ns}"
        finally:
            os.close(file)

    def _holder(self) -> str:
        """What tells this holding of the lock from every other; empty if nobody has it."""
        try:
            found = self.path.lstat()
            text = self.path.read_text(errors="replace") if stat.S_ISREG(found.st_mode) else ""
        except OSError:
            return ""
        return text or f"{found.st_ino} {found.st_mtime_ns}"

    def _take_away(self, holder: str) -> None:
        """Remove the lock if it is still that holder's: of two that wait, the second must not remove the first's."""
        with self._guard():
            if self._holder() == holder:
                self.path.unlink(missing_ok=True)

    @contextmanager
    def _guard(self) -> Iterator[None]:
        """One process at a time looks who holds the lock and removes it; ends with the process, however it ends."""
        with _threads:
            file = os.open(f"{self.path}.guard", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
            try:
                with suppress(OSError):  # a file system without record locks: as good as Optuna's
                    fcntl.lockf(file, fcntl.LOCK_EX)
                yield
            finally:
                os.close(file)


def _process(holder: str) -> ProcessId | None:
    with suppress(ValueError):
        return ProcessId.read(json.loads(holder))
    return None
