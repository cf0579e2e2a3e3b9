"""Which checkpoints of a folder are whole."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from math import inf
from pathlib import Path
from typing import TypeVar

from lightning_bharat.checkpoints.errors import CheckpointError
from lightning_bharat.checkpoints.fetched import Fetched, opened
from lightning_bharat.checkpoints.index import read_json
from lightning_bharat.checkpoints.manifest import COMMIT, MANIFEST
from lightning_bharat.checkpoints.remote import Place, Remote, StoreError

P = TypeVar("P", Path, Remote, Place)


def problems(place: Place) -> Iterator[str]:
    """What is wrong with the checkpoint at ``place``, a line each; nothing if it is whole.

    Every byte of every file is compared with its digest; then the index and the state are read as a resume reads them,
    and each tensor must be where the index says.

    Raises:
        StoreError: it lies in a store that can't be reached: nothing is known about it.
    """
    try:
        checkpoint = opened(place)
    except StoreError:
        raise
    except CheckpointError as error:
        yield str(error)
        return
    bad = False
    for name in checkpoint.manifest.files:
        try:
            checkpoint.check(checkpoint.folder / name)
        except StoreError:
            raise
        except CheckpointError as error:
            bad = True
            yield str(error)
    known = {*checkpoint.manifest.files, MANIFEST, COMMIT}
    for name in checkpoint.names():
        if name not in known:
            bad = True
            yield f"{place / name} is not among the files that {place / MANIFEST} lists"
    if not bad:
        try:
            checkpoint.try_all()
        except CheckpointError as error:
            yield str(error)


def checkpoints_in(folder: P) -> list[P]:
    """All checkpoint directories in and below ``folder``, whole or not, in order of their steps.

    Raises:
        StoreError: it lies in a store that can't be reached.
    """
    return sorted(found_in(folder), key=lambda place: (_step(place), str(place)))


def newest_whole(folder: Path) -> Path | None:
    """Of the checkpoints in and below ``folder`` the one of the last step that is whole; ``None`` if there is none."""
    return next((path for path in reversed(checkpoints_in(folder)) if not any(problems(path))), None)


def found_in(folder: P) -> Iterator[P]:
    """As :func:`checkpoints_in`, in no order."""
    if isinstance(folder, Path):
        yield from (path for path in [folder, *folder.rglob("*")] if path.is_dir() and _looks_like_one(path))
        return
    try:
        yield from folder.below(_has_one)
    except FileNotFoundError:
        return


def _looks_like_one(path: Path) -> bool:
    is_hidden = any(part.startswith(".") for part in path.parts[-2:])  # of a save that was killed
    return not is_hidden and _has_one([name for name in (MANIFEST, COMMIT) if (path / name).exists()])


def _has_one(files: Collection[str]) -> bool:
    return MANIFEST in files or COMMIT in files


def _step(place: Place) -> float:
    """Of a damaged one too, as far as its manifest can be read; what can't be known may be the newest."""
    try:
        if isinstance(place, Remote):
            return float(Fetched(place).manifest.step)
        return float(read_json(place / MANIFEST)["step"])
    except StoreError:
        raise
    except (CheckpointError, KeyError, TypeError, ValueError):
        return inf
