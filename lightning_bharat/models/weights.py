"""A start from given weights: what lies in a file or folder, by the names that a module has for it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from lightning_bharat.checkpoints import CheckpointError, StoredTensor, is_checkpoint
from lightning_bharat.checkpoints.opened import open_any

Weights = Mapping[str, Tensor | StoredTensor]


def read_weights(path: str | Path) -> dict[str, Tensor | StoredTensor]:
    """The tensors at ``path`` by name. They stay on disk until they are used, and no code from the file is run.

    Args:
        path: a ``.safetensors`` file, a folder of them (as Hugging Face's ``save_pretrained`` and ``bharat checkpoint
            export`` write), a Lightning ``.ckpt``, or a checkpoint directory.

    Raises:
        CheckpointError: there is none of these, or it is damaged.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        files = [path]
    elif path.is_dir() and not is_checkpoint(path):
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"weights={str(path)!r} is a folder without .safetensors files")
    else:
        return open_any(path).weights()
    return {name: tensor for file in files for name, tensor in _read_safetensors(file).items()}


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise CheckpointError(f"weights={str(file)!r} does not exist")
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118, it is no dict
    except Exception as error:  # the library has an exception of its own for each way to be damaged
        raise CheckpointError(f"weights={str(file)!r} can't be read: {error}") from error


def under(weights: Weights, prefix: str) -> dict[str, Tensor | StoredTensor]:
    """``weights`` with ``prefix`` once before each name, however often it was there.

    Hugging Face puts ``model.`` before all names but the head's, a LightningModule with ``self.model`` puts it before
    all, and one that holds a Hugging Face model before all twice.
    """
    again = re.compile(f"^(?:{re.escape(prefix)})*")
    return {again.sub(prefix, name): tensor for name, tensor in weights.items()}
