"""Plain Lightning `.ckpt` files: one file with everything, which Lightning reads and writes on one process."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import torch

from lightning_bharat.checkpoints.directory import hidden, make_folder, sync
from lightning_bharat.checkpoints.document import safe_load
from lightning_bharat.checkpoints.errors import CheckpointError


def read(path: Path) -> dict[str, Any]:
    """Lightning's dict; its tensors stay on disk (memory-mapped) until they are used. No code from the file is run.

    Raises:
        CheckpointError: it is missing, damaged, not a Lightning checkpoint, or holds objects that only code can build.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    found = safe_load(path, mmap=zipfile.is_zipfile(path))
    if "state_dict" not in found:
        raise CheckpointError(f"{path} is not a Lightning checkpoint: it has no 'state_dict', but {list(found)[:8]}")
    return found


def write(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write Lightning's dict to ``path``, which appears when it is whole and on disk."""
    make_folder(path.parent)
    staging = hidden(path)
    try:
        with staging.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staging, path)
        sync(path.parent)
    finally:
        staging.unlink(missing_ok=True)
