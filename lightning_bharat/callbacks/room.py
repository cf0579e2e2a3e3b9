"""Whether a disk has room for a checkpoint, looked at before the first step."""

from __future__ import annotations

import os
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_bharat.checkpoints import directory
from lightning_bharat.checkpoints.errors import CheckpointError
from lightning_bharat.plan.elsewhere import is_elsewhere
from lightning_bharat.strategies.collectives import highest


def warn_of_room(trainer: pl.Trainer, folder: Path) -> None:
    """Say so where not even the weights that one rank knows of fit; a checkpoint has no less.

    All ranks must call it.
    """
    known = (p for p in trainer.lightning_module.parameters() if not is_elsewhere(p))
    least = highest(trainer, [sum(p.numel() * p.itemsize for p in known)])[0]
    try:
        directory.need_space(folder / "a checkpoint", least)
    except CheckpointError as error:
        rank_zero_warn(f"{os.uname().nodename}: no save will succeed as it is: {error}")
