"""Checkpoints in a store: opened there, of which each file is fetched when it is needed, or brought here whole."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from lightning_bharat.checkpoints import directory
from lightning_bharat.checkpoints.errors import CheckpointError
from lightning_bharat.checkpoints.manifest import COMMIT, MANIFEST, Manifest
from lightning_bharat.checkpoints.remote import Place, Remote, place_of
from lightning_bharat.checkpoints.stored import Checkpoint

_THREADS = 4  # that fetch files at once
_LOCK = ".fetching"
FETCHED = "fetched"  # the folder, in that of a run, for what a run goes on from


class MissingFile(CheckpointError):
    """A checkpoint that lacks the file ``name``."""

    name = ""


class Fetched(Checkpoint):
    """A checkpoint at a URL, opened. Files are fetched to a temporary folder (``TMPDIR``) when they are first needed,
    and compared with their digests; it goes when this does.

    Raises:
        CheckpointError: it isn't one, is damaged, or an incomplete copy.
        StoreError: the store can't be reached.
    """

    def __init__(self, remote: Remote) -> None:
        self.remote = remote
        above = tempfile.mkdtemp(prefix="bharat-")
        weakref.finalize(self, shutil.rmtree, above, True)
        self.folder = Path(above) / remote.name
        self.folder.mkdir()
        self._checked: set[Path] = set()
        for name in (MANIFEST, COMMIT):
            self.fetch(self.folder / name)
        with by_url(self.folder, remote):
            self.manifest = Manifest.alone(self.folder)

    def check(self, path: Path) -> None:
        if path not in self._checked:
            if not path.exists() and path.name in self.manifest.files:
                directory.need_space(path, self.manifest.files[path.name]["bytes"])
                self.fetch(path)
            with by_url(self.folder, self.remote):
                super().check(path)

    def load(self) -> dict[str, Any]:
        with by_url(self.folder, self.remote):
            return super().load()

    def try_all(self) -> None:
        with by_url(self.folder, self.remote):
            super().try_all()

    def names(self) -> list[str]:
        return sorted(self._there())

    def look(self) -> None:
        there = self._there()
        for name, said in self.manifest.files.items():
            if name not in there:
                raise self._missing(name)
            size = there[name]
            if size is None:
                size = (self.remote / name).size()
            if size not in (None, said["bytes"]):
                raise CheckpointError(
                    f"{self.remote / name} has {size} bytes and was written with {said['bytes']}: {self.remote} is "
                    "damaged"
                )

    def _there(self) -> dict[str, int | None]:
        try:
            return self.remote.look()[0]
        except FileNotFoundError:
            raise CheckpointError(f"{self.remote} can't be listed") from None

    def fetch(self, target: Path) -> None:
        """Write the file of that name to ``target``."""
        try:
            (self.remote / target.name).fetch(target)
        except FileNotFoundError:
            raise self._missing(target.name) from None

    def _missing(self, name: str) -> CheckpointError:
        error = MissingFile(f"{self.remote / name} is missing: {self.remote} is no checkpoint, or an incomplete copy")
        error.name = name
        return error


@contextmanager
def by_url(folder: Path, remote: Remote) -> Iterator[None]:
    """Errors about files in ``folder`` name them by URL."""
    try:
        yield
    except CheckpointError as error:
        if str(folder) not in str(error):
            raise
        raise type(error)(str(error).replace(str(folder), str(remote))) from None


def opened(place: Place) -> Checkpoint:
    """The checkpoint directory at ``place``.

    Raises:
        CheckpointError: it isn't one, is damaged, or an incomplete copy.
    """
    return Fetched(place) if isinstance(place, Remote) else Checkpoint(place)


def bring(remote: Remote, folder: Path) -> Path:
    """Copy the checkpoint at ``remote``, a directory of ours or a plain file, into ``folder``, where it appears when
    all of it is there and has been compared with its digests. Of several processes that ask for it, here or on other
    hosts that see this folder, one does it.

    Returns:
        Where it is: under its own name, or, where another checkpoint has that, with a version as Lightning writes it.

    Raises:
        CheckpointError: it is damaged, or no checkpoint; too little space.
        StoreError: the store can't be reached.
        OSError: the disk.
    """
    directory.make_folder(folder)
    with _alone(folder):
        try:
            found = Fetched(remote)
        except MissingFile as error:
            if error.name != MANIFEST:
                raise
            return _bring_file(remote, folder / remote.name, error)
        target = next(path for path in _names(folder, remote.name) if not path.exists() or _is(path, found))
        if target.exists():
            return target
        directory.need_space(target, sum(said["bytes"] for said in found.manifest.files.values()))
        with directory.own_directory(target) as staging, by_url(staging, remote):
            for name in (MANIFEST, COMMIT):
                shutil.copyfile(found.folder / name, staging / name)
            with ThreadPoolExecutor(_THREADS) as pool:
                for _ in pool.map(lambda name: _fetch_one(found, staging / name), found.manifest.files):
                    pass
            for path in staging.iterdir():
                directory.sync(path)
    return target


def on_disk(path: Any, root: str) -> Any:
    """``path``; of a checkpoint in a store a copy in the folder of the run, ``root``."""
    remote = place_of(path) if isinstance(path, (str, Path)) else None
    if not isinstance(remote, Remote):
        return path
    folder = place_of(root)
    return str(bring(remote, (folder if isinstance(folder, Path) else Path(tempfile.gettempdir())) / FETCHED))


def _bring_file(remote: Remote, target: Path, no_directory: MissingFile) -> Path:
    try:
        if not target.is_file() or target.stat().st_size != remote.size():
            remote.fetch(target)
    except FileNotFoundError:
        raise no_directory from None
    return target


def _fetch_one(found: Fetched, target: Path) -> None:
    found.fetch(target)
    found.manifest.check_file(target)


def _is(path: Path, found: Fetched) -> bool:
    """Whether ``path`` is a copy of it. Files are checked where they are read."""
    mine, its = path / COMMIT, found.folder / COMMIT
    return mine.is_file() and mine.read_bytes() == its.read_bytes()


def _names(folder: Path, name: str) -> Iterator[Path]:
    yield folder / name
    stem, suffix = os.path.splitext(name)
    for version in count(1):
        yield folder / f"{stem}-v{version}{suffix}"


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process fetches into ``folder``."""
    file = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)
