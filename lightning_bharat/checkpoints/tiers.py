"""Further places for checkpoints that are on disk: each gets every k-th one, and keeps as many as it is to."""

from __future__ import annotations

import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lightning_bharat.checkpoints import directory
from lightning_bharat.checkpoints.background import Background
from lightning_bharat.checkpoints.compressed_copy import write_compressed
from lightning_bharat.checkpoints.manifest import COMMIT, MANIFEST, Manifest
from lightning_bharat.checkpoints.newest import check
from lightning_bharat.checkpoints.remote import Remote
from lightning_bharat.checkpoints.saving import Compression

_HOLD = ".hold"


@dataclass(frozen=True)
class Tier:
    """A place, and what it gets.

    Args:
        path: a folder (another disk, a shared one, or ``/dev/shm``, which outlives a process and not a machine), or a
            URL that fsspec writes to (``s3://...``, with the package that fsspec asks for).
        every: of how many saves one is copied there.
        keep: how many, the newest ones; 0: all.
        compression: ``"zstd"`` writes the copies in fewer bytes, without loss; the checkpoints that they are of stay as
            they are.

    Raises:
        ValueError: a number below 1 (``keep``: below 0), or another compression.
    """

    path: str
    every: int = 1
    keep: int = 1
    compression: Compression | None = None

    def __post_init__(self) -> None:
        for name, least in (("every", 1), ("keep", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"Tier({name}={value!r}): write a whole number from {least} up")
        if self.compression not in (None, "zstd"):
            raise ValueError(f"Tier(compression={self.compression!r}): write 'zstd', or None")

    @property
    def is_url(self) -> bool:
        """Whether it is reached by fsspec."""
        return "://" in self.path


class Tiers:
    """Copies checkpoints to ``tiers`` in a thread; one process does it for all. A copy that is still being made when
    the next one is due lets that one wait, and only the newest of those that wait is made.

    Args:
        say: told of each copy that was made or has failed: ``say("tier", path=...)``, ``say("tier_failed", ...)``.
    """

    def __init__(self, tiers: Sequence[Tier], say: Callable[..., None]) -> None:
        self.tiers, self._say = list(tiers), say
        self._writers = [Background() for _ in self.tiers]
        self._waiting: list[Path | None] = [None] * len(self.tiers)
        self._saves = 0

    def offer(self, path: Path) -> None:
        """The checkpoint ``path`` is there. It may be removed after this."""
        self._saves += 1
        for number, tier in enumerate(self.tiers):
            if self._saves % tier.every == 0:
                before, self._waiting[number] = self._waiting[number], hold(path)
                if before is not None:
                    shutil.rmtree(before, ignore_errors=True)
                self._writers[number].do(lambda number=number: self._copy(number))  # type: ignore[misc]

    def wait(self) -> None:
        """Wait until all copies are made."""
        for writer in self._writers:
            writer.wait()

    def _copy(self, number: int) -> None:
        tier, (held, self._waiting[number]) = self.tiers[number], (self._waiting[number], None)
        if held is None:  # a newer one has been copied in its place
            return
        try:
            self._say("tier", path=copy_to(tier, held))
        except Exception as error:  # of any store
            self._say("tier_failed", path=tier.path, error=f"{type(error).__name__}: {error}")
        finally:
            shutil.rmtree(held, ignore_errors=True)


def hold(path: Path) -> Path:
    """A hidden second name for the files of ``path``, which stay when that is removed."""
    held = _new_hold(path.parent)
    directory.link(path, held)
    return held


def _new_hold(folder: Path) -> Path:
    return folder / f".{uuid.uuid4().hex[:8]}{_HOLD}"


def forget_holds(folder: Path) -> None:
    """Remove those that a killed process has left in ``folder``."""
    for held in folder.glob(f".*{_HOLD}"):
        shutil.rmtree(held, ignore_errors=True)


def copy_to(tier: Tier, checkpoint: Path) -> str:
    """Copy the directory ``checkpoint`` to ``tier``, where it appears when it is whole; remove what is too old there.

    Returns:
        Where it is.

    Raises:
        CheckpointError: it is damaged, or its copy is; too little space.
        OSError: the disk, or the store.
    """
    step = Manifest.read(checkpoint).step
    return _upload(tier, checkpoint, step) if tier.is_url else _copy_here(tier, checkpoint, step)


def _copy_here(tier: Tier, checkpoint: Path, step: int) -> str:
    target = directory.local_path(Path(tier.path) / f"step={step}.ckpt")
    directory.need_space(target, sum(file.stat().st_size for file in checkpoint.iterdir()))
    with directory.own_directory(target) as staging:
        if tier.compression:
            write_compressed(checkpoint, staging)
        else:
            for file in checkpoint.iterdir():
                shutil.copyfile(file, staging / file.name)
                directory.sync(staging / file.name)
        check(staging)
    names = [path.name for path in Path(tier.path).iterdir() if (path / COMMIT).exists()]
    for name in _too_old(names, tier.keep):
        directory.remove(Path(tier.path) / name)
    return str(target)


def _upload(tier: Tier, checkpoint: Path, step: int) -> str:
    """`COMMIT` goes last, and is removed first: a copy without it is none."""
    store, last = Remote(tier.path.rstrip("/")), (MANIFEST, COMMIT)
    target = store / f"step={step}.ckpt"
    target.remove(COMMIT)
    target.make()
    with _as_sent(tier, checkpoint) as folder:
        for name in (*(file.name for file in folder.iterdir() if file.name not in last), *last):
            (target / name).put(folder / name)
    for name in _too_old(store.look()[1], tier.keep):
        (store / name).remove(COMMIT)
    return str(target)


@contextmanager
def _as_sent(tier: Tier, checkpoint: Path) -> Iterator[Path]:
    if tier.compression is None:
        yield checkpoint
        return
    directory.need_space(checkpoint, sum(file.stat().st_size for file in checkpoint.iterdir()))
    packed = _new_hold(checkpoint.parent)
    packed.mkdir()
    try:
        write_compressed(checkpoint, packed)
        yield packed
    finally:
        shutil.rmtree(packed, ignore_errors=True)


def _too_old(names: Sequence[str], keep: int) -> list[str]:
    """Of names that a tier gives all but the newest ``keep``.

    >>> _too_old(["step=9.ckpt", "step=10.ckpt", "other", "step=2.ckpt"], 2)
    ['step=2.ckpt']
    """
    known = {name: int(found[1]) for name in names if (found := re.fullmatch(r"step=(\d+)\.ckpt", name))}
    by_age = sorted(known, key=lambda name: known[name])
    return by_age[:-keep] if keep else []
