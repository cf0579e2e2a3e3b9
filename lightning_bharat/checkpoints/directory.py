"""A checkpoint as a directory that is whole or does not exist.

It is written beside its place under a hidden name, brought to disk, and then given its name by one rename. Where an
older one of that name is there, both names are exchanged in one step of the kernel, so that a process killed at any
moment leaves the old or the new checkpoint, never half of one.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_bharat.checkpoints.errors import CheckpointError, on_rank_zero

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # <fcntl.h>, <linux/fs.h>


def local_path(path: Any) -> Path:
    """``path`` as a :class:`Path`.

    Raises:
        CheckpointError: it is no path, or a URL; checkpoints are written to file systems.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise CheckpointError(f"a checkpoint's path is {path!r}; write a string or a Path")
    if "://" in str(path):
        raise CheckpointError(f"{path!s} is a URL; checkpoints are directories: write to a mounted path and copy it")
    return Path(os.path.abspath(path))


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A hidden sibling of ``path`` for all ranks to write to, which becomes ``path`` when the block has ended.

    All ranks must enter it. Where the block raises, ``path`` stays as it was.
    """
    staging = on_rank_zero(lambda: stage(path))
    try:
        yield staging
        on_rank_zero(lambda: commit(staging, path))
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


@contextmanager
def own_directory(path: Path) -> Iterator[Path]:
    """As :func:`new_directory`, for one process alone."""
    staging = stage(path)
    try:
        yield staging
        commit(staging, path)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def hidden(path: Path, part: str = "") -> Path:
    """A new hidden sibling of ``path``. Its name does not hold that of ``path``, in which Lightning looks for words."""
    of_name = zlib.crc32(path.name.encode())
    return path.with_name(f".{of_name:08x}-{part or uuid.uuid4().hex[:8]}.tmp")


def stage(path: Path) -> Path:
    """Make the hidden directory that becomes ``path`` (:func:`commit`), and remove those of saves that were killed."""
    make_folder(path.parent)
    for stale in path.parent.glob(hidden(path, "*").name):  # of a save that was killed
        shutil.rmtree(stale, ignore_errors=True)
    staging = hidden(path)
    staging.mkdir()
    return staging


def forget_leavings(folder: Path) -> None:
    """Remove what processes that were killed while they saved or removed have left in ``folder``. Nobody else may write
    there."""
    for stale in folder.glob(".????????-????????.tmp"):
        shutil.rmtree(stale, ignore_errors=True)


def make_folder(folder: Path) -> None:
    """Make ``folder``, and those above it, so that a machine that loses its power keeps them."""
    missing = [parent for parent in (folder, *folder.parents) if not parent.is_dir()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in reversed(missing):
        sync(made.parent)


def need_space(path: Path, size: int) -> None:
    """Look whether ``size`` bytes can be written beside ``path``, before any is.

    Raises:
        CheckpointError: names what is free and what is needed.
    """
    folder = next(parent for parent in path.parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if free < size:
        raise CheckpointError(
            f"{path} needs {in_units(size)} and {folder} has {in_units(free)} free: free some space, keep fewer "
            "checkpoints, or write elsewhere"
        )


def in_units(size: int) -> str:
    """Bytes for people.

    >>> in_units(1234567)
    '1.2 MB'
    """
    value, units = float(size), ["B", "KB", "MB", "GB", "TB", "PB", "EB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}"


def commit(staging: Path, path: Path) -> None:
    """Give ``staging`` the name ``path`` for good; what had that name is removed after."""
    sync(staging)
    if path.is_symlink() or path.is_file():
        path.unlink()
    if not path.exists():
        os.rename(staging, path)
        sync(path.parent)
        return
    if not _exchange(staging, path):
        aside = hidden(path)
        os.rename(path, aside)
        os.rename(staging, path)
        staging = aside
    sync(path.parent)
    shutil.rmtree(staging)


def link(path: Path, name: Path) -> None:
    """Let ``name`` be the checkpoint ``path`` too, with the same bytes on disk: neither needs the other to stay."""
    if path.is_dir():
        with own_directory(name) as staging:
            for file in path.iterdir():
                _link_file(file, staging / file.name)
        return
    aside = hidden(name)
    _link_file(path, aside)
    os.replace(aside, name)


def _link_file(path: Path, name: Path) -> None:
    try:
        os.link(path, name)
    except OSError:  # a file system that has no such links
        shutil.copyfile(path, name)
        sync(name)


def point(name: Path, path: Path) -> None:
    """Let ``name`` be a symbolic link to the checkpoint ``path`` beside it."""
    if name == path:
        return
    if name.is_dir() and not name.is_symlink():
        remove(name)
    aside = hidden(name)
    aside.symlink_to(os.path.relpath(path, name.parent))
    os.replace(aside, name)


def remove(path: Path) -> None:
    """Remove the checkpoint ``path``: first its name, so that a process killed here leaves no half checkpoint."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        aside = hidden(path)
        os.rename(path, aside)
        sync(path.parent)  # else the name may outlast what it names
        shutil.rmtree(aside)


def sync(folder: Path) -> None:
    """Bring the names in ``folder`` to disk, or the content of a file."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step (Linux's ``renameat2``). ``False`` where the system or the file system can't."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    return rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0
