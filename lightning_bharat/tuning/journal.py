"""Optuna's journal, which a killed writer or a full disk can't make unreadable.

Each record is a line of JSON. Optuna appends behind whatever is there: half a record, left by a writer that was killed
or had no room, swallows the next one, and from then on no process can open the study (Optuna's issue 5138).
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from optuna.storages.journal import JournalFileBackend

from lightning_bharat.tuning.errors import StorageError
from lightning_bharat.tuning.journal_lock import JournalLock

_RECORD = b'{"op_code":'  # as Optuna writes each
_logger = logging.getLogger(__name__)


class Journal(JournalFileBackend):
    """A journal file that is whole before and after each record.

    A record counts when its line's end is on the disk; what a writer left without one was told to nobody, and is cut
    off before the next record is written.

    Args:
        file: The journal; made if it is not there.

    Raises:
        StorageError: a line in the middle can't be read and it is not known for certain what it was.
    """

    def __init__(self, file: Path) -> None:
        self.path = file
        self._file_lock = JournalLock(file)
        super().__init__(str(file), lock_obj=self._file_lock)
        self._mend()

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Write records to the disk, all or none.

        Raises:
            StorageError: no room, or the disk fails; the journal is as it was.
        """
        text = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode()
        self._file_lock.acquire()
        try:
            file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                size = _cut_torn(file, self.path)
                self._write(file, text, size)
            finally:
                os.close(file)
        finally:
            self._file_lock.release()

    def _write(self, file: int, text: bytes, size: int) -> None:
        left = text
        try:
            while left:
                left = left[os.write(file, left) :]
            os.fsync(file)
        except OSError as error:
            if left:  # else the line is whole, and another process may have read it
                os.ftruncate(file, size)
            raise StorageError(
                f"{self.path}: a record of {len(text)} bytes can't be written ({error.strerror}). Make room and start "
                "the same command again: it goes on from the records before"
            ) from error

    def _mend(self) -> None:
        """Look at every line; write only where something is wrong, as a study may be opened only to be read."""
        if _defects(self.path.read_bytes()) == ([], 0):
            return
        self._file_lock.acquire()
        try:
            content = self.path.read_bytes()  # again: another may have mended it, or been in the middle of a record
            lines, torn = _defects(content)
            if lines:
                self._replace(content, lines)
            elif torn:
                file = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
                try:
                    _cut_torn(file, self.path)
                finally:
                    os.close(file)
        finally:
            self._file_lock.release()

    def _replace(self, content: bytes, bad: list[int]) -> None:
        """A record that was glued to a torn one gets its own line; the journal as it was is kept beside it."""
        lines = content.split(b"\n")[:-1]
        for index in bad:
            whole = _behind_torn(lines[index])
            if whole is None:
                raise StorageError(_refusal(self.path, lines, index))
            lines[index] = whole
        kept = _free(self.path)
        kept.write_bytes(content)
        new = Path(f"{self.path}.mended")
        with new.open("wb") as file:
            file.write(b"".join(line + b"\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, self.path)
        numbers = ", ".join(str(index + 1) for index in bad)
        _logger.warning(
            f"{self.path}: in line {numbers} a record was written behind half of another. The half, which nobody had "
            f"read, is left out; all {len(lines)} whole records are kept. As it was: {kept}"
        )


def _cut_torn(file: int, path: Path) -> int:
    """Cut off what stands behind the last line's end, under the lock; returns the size that is left."""
    size = os.fstat(file).st_size
    end, step = size, 4096
    while end:
        start = max(0, end - step)
        newline = os.pread(file, end - start, start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end < size:
        os.ftruncate(file, end)
        os.fsync(file)
        _logger.warning(f"{path}: {size - end} bytes of a record that was never finished are cut off")
    return end


def _defects(content: bytes) -> tuple[list[int], int]:
    """The lines (from 0) that are no record, and how many bytes stand behind the last line's end."""
    lines = content.split(b"\n")
    return [index for index, line in enumerate(lines[:-1]) if not _is_record(line)], len(lines[-1])


def _is_record(line: bytes) -> bool:
    try:
        record = json.loads(line)
    except ValueError:  # of JSON or of UTF-8
        return False
    return isinstance(record, dict) and "op_code" in record


def _behind_torn(line: bytes) -> bytes | None:
    """The whole record behind the beginning of another, or behind zeros that a power cut left; None if it is not so.

    The beginning had reached no reader, so leaving it out changes the number of no trial. Any other damage is to a
    record that was read, and without it the numbers of all later trials would shift.
    """
    at = line.rfind(_RECORD)
    torn = line[: max(at, 0)].strip(b"\0")
    if at <= 0 or not _is_record(line[at:]) or not (torn.startswith(_RECORD) or _RECORD.startswith(torn)):
        return None
    return line[at:]


def _refusal(path: Path, lines: list[bytes], index: int) -> str:
    offset = sum(len(line) + 1 for line in lines[:index])
    return (
        f"{path}: line {index + 1} (from byte {offset}) is no record of Optuna's: {lines[index][:60]!r}. It is not "
        f"known what it was, and the numbers of later trials may hang on it, so nothing is changed. Restore the file; "
        f"or keep what comes before, without the {len(lines) - index - 1} records behind it: "
        f"head -n {index} {path.name} > new.journal"
    )


def _free(path: Path) -> Path:
    number = 1
    while (found := Path(f"{path}.torn-{number}")).exists():
        number += 1
    return found
