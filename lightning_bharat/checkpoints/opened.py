"""Any checkpoint, opened the same way: a directory of ours, one of DeepSpeed's, or a plain Lightning `.ckpt`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_bharat.checkpoints import deepspeed, plain, stored
from lightning_bharat.checkpoints.errors import CheckpointError
from lightning_bharat.checkpoints.fetched import Fetched, MissingFile, by_url
from lightning_bharat.checkpoints.manifest import FORMAT, MANIFEST
from lightning_bharat.checkpoints.remote import Place, Remote, place_of


@dataclass(frozen=True)
class Opened:
    """A checkpoint whose tensors have not been read.

    Attributes:
        path: where it lies.
        kind: of our directories, DeepSpeed's, or Lightning's files.
        content: Lightning's dict.
        about: the manifest's fields; ``{}`` for what plain Lightning or DeepSpeed wrote.
    """

    path: Place
    kind: Literal["directory", "directory of DeepSpeed", "plain Lightning file"]
    content: dict[str, Any]
    about: dict[str, Any]

    def weights(self) -> dict[str, Tensor | stored.StoredTensor]:
        """The module's tensors by name (tied ones under each name), without extra state."""
        state = self.content["state_dict"]
        return {name: value for name, value in state.items() if isinstance(value, (Tensor, stored.StoredTensor))}

    def nbytes(self) -> int:
        """Of all tensors that are stored by themselves, as they are in memory."""
        return sum(value.shape.numel() * value.dtype.itemsize for value in _distinct(self.content).values())


def _distinct(tree: Any) -> dict[str, stored.StoredTensor]:
    found: dict[str, stored.StoredTensor] = {}
    if isinstance(tree, stored.StoredTensor):
        found[tree.name] = tree
    for part in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ():
        found |= _distinct(part)
    return found


def open_any(checkpoint: str | Path | Remote) -> Opened:
    """Open a directory (ours or DeepSpeed's) or a ``.ckpt`` without reading its tensors and without running its code.

    Args:
        checkpoint: also a URL of a directory of ours, or of a file.

    Raises:
        CheckpointError: it is neither, or is damaged.
        StoreError: its store can't be reached.
    """
    path = place_of(checkpoint)
    if isinstance(path, Remote):
        return _open_remote(path)
    if deepspeed.is_checkpoint(path):
        return Opened(path, "directory of DeepSpeed", content_of(path), {})
    if path.is_dir():
        return _of_ours(path, stored.Checkpoint(path))
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; write a directory with {MANIFEST}, or a Lightning .ckpt file")
    return _of_file(path, plain.read(path))


def _open_remote(remote: Remote) -> Opened:
    try:
        return _of_ours(remote, Fetched(remote))
    except MissingFile as no_directory:
        if no_directory.name != MANIFEST:
            raise
        with TemporaryDirectory(prefix="bharat-") as folder:
            file = Path(folder) / remote.name
            try:
                remote.fetch(file)
            except FileNotFoundError:
                raise no_directory from None
            with by_url(file, remote):
                return _of_file(remote, plain.read(file))  # mapped to memory: it may lose its name


def _of_ours(path: Place, found: stored.Checkpoint) -> Opened:
    return Opened(path, "directory", found.load(), vars(found.manifest))


def _of_file(path: Place, content: dict[str, Any]) -> Opened:
    return Opened(path, "plain Lightning file", content, content.pop(FORMAT, {}))


def content_of(path: Path) -> dict[str, Any]:
    """Lightning's dict, as a strategy loads it; see :func:`open_any`."""
    if path.is_file():
        return plain.read(path)
    return deepspeed.read(path) if deepspeed.is_checkpoint(path) else stored.Checkpoint(path).load()


def reader(value: Tensor | stored.StoredTensor, dtype: torch.dtype | None = None) -> Callable[[], Tensor]:
    """A function that reads ``value`` when it is called, floating point as ``dtype``."""

    def read() -> Tensor:
        whole = value.read() if isinstance(value, stored.StoredTensor) else value
        return whole.to(dtype_after(value, dtype))

    return read


def dtype_after(value: Tensor | stored.StoredTensor, dtype: torch.dtype | None) -> torch.dtype:
    """Type of ``value`` once floating point is cast to ``dtype``."""
    return dtype if dtype is not None and value.dtype.is_floating_point else value.dtype
