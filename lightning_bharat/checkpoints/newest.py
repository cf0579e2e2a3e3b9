"""The checkpoint to go on from: of those in some folders and stores the newest that is whole."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lightning_bharat.checkpoints.document import safe_load
from lightning_bharat.checkpoints.errors import CheckpointError
from lightning_bharat.checkpoints.fetched import Fetched, bring
from lightning_bharat.checkpoints.manifest import Manifest
from lightning_bharat.checkpoints.remote import Place, Remote, StoreError
from lightning_bharat.checkpoints.whole import found_in

_THREADS = 8
_UNKNOWN = 2**62  # as a step: what can't be known may be the newest


def newest_of(
    places: Iterable[Place], say: Callable[[str], None], every_byte: bool = True, here: Path | None = None
) -> Path | None:
    """The newest whole checkpoint in and below ``places``; ``None`` where there is none at all.

    Args:
        say: told of each newer one that is not whole, by file and reason.
        every_byte: compare the files with their digests; else look whether they are there, with the right sizes.
        here: the folder to which one in a store is copied, whose every byte is compared.

    Raises:
        CheckpointError: there are some, and none of them is whole.
        StoreError: a store can't be reached, and there is none elsewhere; or the newest one is in it.
    """
    found, unknown = _by_age(places)
    for _, place in found:
        try:
            path = _whole(place, every_byte, here)
        except StoreError:
            raise
        except CheckpointError as error:
            say(f"{place} is passed over: {error}")
            continue
        for silent in unknown:
            say(f"{silent}. {path} is taken; a newer one there would not be known")
        return path
    if unknown:
        raise unknown[0]
    if found:
        raise CheckpointError(
            f"none of the {len(found)} checkpoints is whole (the newest is {found[0][1]}); bharat checkpoint verify "
            "names what is damaged. To begin anew, move them away or leave ckpt_path out"
        )
    return None


def _by_age(places: Iterable[Place]) -> tuple[list[tuple[tuple[int, float], Place]], list[StoreError]]:
    """What there is, the newest first (of the same step one on a disk), and of which stores it is not known."""
    found: dict[Place, tuple[int, float]] = {}
    unknown = []
    for place in places:
        try:
            found |= {one: _age(one) for one in _all_in(place)}
        except StoreError as error:
            unknown.append(error)
    by_age = sorted(((age, place) for place, age in found.items()), key=lambda one: (one[0], str(one[1])), reverse=True)
    return by_age, unknown


def _whole(place: Place, every_byte: bool, here: Path | None) -> Path:
    if isinstance(place, Path):
        check(place, every_byte)
        return place
    if here is None:
        raise CheckpointError("it is in a store, and there is no folder to copy it to")
    return bring(place, here)


def check(path: Path, every_byte: bool = True) -> None:
    """Look whether the checkpoint ``path``, a directory of ours or a plain file, is whole.

    Raises:
        CheckpointError: it isn't; names the file and what is wrong.
    """
    if path.is_file():
        _check_plain(path, every_byte)
        return
    manifest = Manifest.read(path)
    if every_byte:
        with ThreadPoolExecutor(_THREADS) as pool:
            for _ in pool.map(lambda name: manifest.check_file(path / name), manifest.files):
                pass


def _all_in(folder: Place) -> Iterator[Place]:
    if isinstance(folder, Remote):
        yield from found_in(folder)
    elif folder.is_dir():
        plain = (path for path in folder.glob("*.ckpt") if path.is_file() and not path.name.startswith("."))
        yield from (path for path in (*found_in(folder), *plain) if not path.is_symlink())


def _age(path: Place) -> tuple[int, float]:
    """What grows with each save: the step, as far as it can be read, and the time."""
    if isinstance(path, Remote):
        return _step_there(path), 0.0
    try:
        step = int(safe_load(path, mmap=True)["global_step"]) if path.is_file() else Manifest.read(path).step
    except (CheckpointError, KeyError, TypeError, ValueError):
        step = _UNKNOWN
    return step, path.stat().st_mtime


def _step_there(remote: Remote) -> int:
    try:
        return Fetched(remote).manifest.step
    except StoreError:
        raise
    except CheckpointError:
        return _UNKNOWN


def _check_plain(path: Path, every_byte: bool) -> None:
    """torch.save's files are zip archives, which have a sum for each of their parts."""
    try:
        with zipfile.ZipFile(path) as file:
            bad = file.testzip() if every_byte else None
    except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    if bad is not None:
        raise CheckpointError(f"{path} is damaged in its part {bad}")
