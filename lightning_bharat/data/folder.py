"""A folder that is there whole or not at all."""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_or_nothing(target: Path) -> Iterator[Path]:
    """A new folder beside ``target`` to fill, which becomes ``target`` by one rename at the end.

    What is in it is on the disk before the rename. An error removes it; what a killed process left is removed by the
    next call, which finds its lock released.

    Raises:
        FileExistsError: ``target`` has appeared meanwhile (another process was first).
    """
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(target)
    folder, lock = _locked_folder(target)
    try:
        yield folder
        folder.chmod(0o777 & ~_umask())  # temporary folders are made private
        _sync(folder)
        os.rename(folder, target)
        _sync_one(target.parent)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError) and target.exists() and error.filename2 == str(target):
            raise FileExistsError(f"{target} has appeared meanwhile") from error
        raise
    finally:
        os.close(lock)


def _prefix(target: Path) -> str:
    return f".{target.name}.unfinished-"


def _locked_folder(target: Path) -> tuple[Path, int]:
    while True:  # until no other process took the new folder for abandoned before it was locked
        folder = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
        try:
            lock = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():
            return folder, lock
        os.close(lock)


def _remove_abandoned(target: Path) -> None:
    for folder in target.parent.glob(glob.escape(_prefix(target)) + "*"):
        try:
            lock = os.open(folder, os.O_RDONLY)
        except OSError:
            continue  # another process has just removed it
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            pass  # its process lives
        finally:
            os.close(lock)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        _sync_one(path)
    _sync_one(folder)


def _sync_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
