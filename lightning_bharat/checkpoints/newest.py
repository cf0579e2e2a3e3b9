"""The checkpoint to go on from: of those in some folders the newest that is whole."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lightning_bharat.checkpoints.document import safe_load
from lightning_bharat.checkpoints.errors import CheckpointError
from lightning_bharat.checkpoints.manifest import Manifest
from lightning_bharat.checkpoints.whole import checkpoints_in

_THREADS = 8


def newest_of(folders: Iterable[Path], say: Callable[[str], None], every_byte: bool = True) -> Path | None:
    """The newest whole checkpoint in and below ``folders``; ``None`` where there is none at all.

    Args:
        say: told of each newer one that is not whole, by file and reason.
        every_byte: compare the files with their digests; else look whether they are there, with the right sizes.

    Raises:
        CheckpointError: there are some, and none of them is whole.
    """
    found = sorted({(_age(path), path) for folder in folders for path in _all_in(folder)}, reverse=True)
    for _, path in found:
        try:
            check(path, every_byte)
        except CheckpointError as error:
            say(f"{path} is passed over: {error}")
        else:
            return path
    if found:
        raise CheckpointError(
            f"none of the {len(found)} checkpoints is whole (the newest is {found[0][1]}); bharat checkpoint verify "
            "names what is damaged. To begin anew, move them away or leave ckpt_path out"
        )
    return None


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


def _all_in(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        plain = (path for path in folder.glob("*.ckpt") if path.is_file() and not path.name.startswith("."))
        yield from (path for path in (*checkpoints_in(folder), *plain) if not path.is_symlink())


def _age(path: Path) -> tuple[int, float]:
    """What grows with each save: the step, as far as it can be read, and the time."""
    try:
        step = int(safe_load(path, mmap=True)["global_step"]) if path.is_file() else Manifest.read(path).step
    except (CheckpointError, KeyError, TypeError, ValueError):
        step = 2**62  # what can't be known may be the newest
    return step, path.stat().st_mtime


def _check_plain(path: Path, every_byte: bool) -> None:
    """torch.save's files are zip archives, which have a sum for each of their parts."""
    try:
        with zipfile.ZipFile(path) as file:
            bad = file.testzip() if every_byte else None
    except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    if bad is not None:
        raise CheckpointError(f"{path} is damaged in its part {bad}")
