"""Which checkpoints of a folder are whole."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf
from pathlib import Path

from lightning_bharat.checkpoints import stored
from lightning_bharat.checkpoints.errors import CheckpointError
from lightning_bharat.checkpoints.index import read_json
from lightning_bharat.checkpoints.manifest import COMMIT, MANIFEST, Manifest


def problems(folder: Path) -> Iterator[str]:
    """What is wrong with the checkpoint in ``folder``, a line each; nothing if it is whole.

    Every byte of every file is compared with its digest; then the index and the state are read as a resume reads them,
    and each tensor must be where the index says.
    """
    try:
        manifest = Manifest.read(folder)
    except CheckpointError as error:
        yield str(error)
        return
    bad = False
    for name in manifest.files:
        try:
            manifest.check_file(folder / name)
        except CheckpointError as error:
            bad = True
            yield str(error)
    known = {*manifest.files, MANIFEST, COMMIT}
    for path in sorted(folder.iterdir()):
        if path.name not in known:
            bad = True
            yield f"{path} is not among the files that {folder / MANIFEST} lists"
    if not bad:
        try:
            stored.Checkpoint(folder).try_all()
        except CheckpointError as error:
            yield str(error)


def checkpoints_in(folder: Path) -> list[Path]:
    """All checkpoint directories in and below ``folder``, whole or not, in order of their steps."""
    found = [path for path in [folder, *folder.rglob("*")] if path.is_dir() and _looks_like_one(path)]
    return sorted(found, key=lambda path: (_step(path), path))


def newest_whole(folder: Path) -> Path | None:
    """Of the checkpoints in and below ``folder`` the one of the last step that is whole; ``None`` if there is none."""
    return next((path for path in reversed(checkpoints_in(folder)) if not any(problems(path))), None)


def _looks_like_one(path: Path) -> bool:
    is_hidden = any(part.startswith(".") for part in path.parts[-2:])  # of a save that was killed
    return not is_hidden and ((path / MANIFEST).exists() or (path / COMMIT).exists())


def _step(path: Path) -> float:
    """Of a damaged one too, as far as its manifest can be read; what can't be known may be the newest."""
    try:
        return float(read_json(path / MANIFEST)["step"])
    except (CheckpointError, KeyError, TypeError, ValueError):
        return inf
