"""Files of weights that are not trained: one that did not change since the checkpoint before is a second name for the
same bytes on disk, and not written again.

Whether they changed is seen by their content, each time: flags and counters of changes would miss some. The file before
is read, too, so that damage to it does not go on into every checkpoint that comes after. Either checkpoint may be
removed: the bytes stay as long as one has them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from lightning_bharat.checkpoints import compressed_file, safetensors_file
from lightning_bharat.checkpoints.compressed_file import Place
from lightning_bharat.checkpoints.digest import check_digest
from lightning_bharat.checkpoints.directory import sync
from lightning_bharat.checkpoints.errors import CheckpointError
from lightning_bharat.checkpoints.safetensors_file import Entry

_METADATA = {"format": "pt"}


def name_of(file: str) -> str:
    """Of the file with the frozen weights of the rank whose other tensors are in ``file``.

    >>> name_of("rank_00003.safetensors")
    'frozen_00003.safetensors'
    """
    return file.replace("rank_", "frozen_")


class FrozenFiles:
    """Those of one rank, in one checkpoint after another.

    Attributes:
        parent: the checkpoint that was committed last, or that the run went on from.
    """

    def __init__(self) -> None:
        self.parent: Path | None = None
        self._packed: tuple[str, str, dict[str, Place]] | None = None

    def write(self, path: Path, entries: Sequence[Entry]) -> tuple[str, dict[str, Place]]:
        """Let ``entries`` be in ``path``, and on disk. Returns as :func:`compressed_file.write` (without places where
        it is none).

        Raises:
            CheckpointError, OSError: as there.
        """
        content = safetensors_file.digest(entries, _METADATA)
        if not path.name.endswith(compressed_file.SUFFIX):
            if not self._link(path, content):
                safetensors_file.write(path, entries, _METADATA)
            return content, {}
        if self._packed is not None and self._packed[0] == content and self._link(path, self._packed[1]):
            return self._packed[1:]
        self._packed = (content, *compressed_file.write(path, entries))
        return self._packed[1:]

    def spared(self, path: Path) -> int:
        """Bytes that the checkpoint ``path`` need not have room for, if nothing has changed."""
        if self.parent is None or not self.parent.is_dir():
            return 0
        near = next(folder for folder in path.parents if folder.is_dir())
        if near.stat().st_dev != self.parent.stat().st_dev:
            return 0
        return sum(file.stat().st_size for file in self.parent.glob(name_of("rank_*")))

    def _link(self, path: Path, digest: str) -> bool:
        """Let ``path`` be the parent's file of that name, if that has ``digest``."""
        if self.parent is None:
            return False
        try:
            os.link(self.parent / path.name, path)
        except OSError:  # there is none, it is on another disk, or in a file system that has no such links
            return False
        try:
            if not path.is_symlink():
                check_digest(path, digest)
                sync(path)
                return True
        except CheckpointError:
            pass
        path.unlink()
        return False
