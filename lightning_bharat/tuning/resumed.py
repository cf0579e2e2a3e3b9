"""Where a trial that was cut off goes on: the newest whole checkpoint in its folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lightning_bharat.checkpoints.errors import CheckpointError
from lightning_bharat.checkpoints.newest import newest_of


def checkpoint_of(folder: Path, say: Callable[[str], None] = print) -> Path | None:
    """The newest whole checkpoint below a trial's folder, by Lightning's callback or ours; ``None``: there is none.

    Args:
        say: told of each newer one that is damaged.
    """
    places = {path.parent for path in folder.rglob("*.ckpt")} | {path.parent.parent for path in folder.rglob("COMMIT")}
    try:
        return newest_of(sorted(places), say)
    except CheckpointError as error:
        say(f"{error}; the trial begins anew")
        return None
