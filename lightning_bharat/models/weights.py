"""A start from given weights: what lies in a file or folder, by the names that a module has for it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from lightning_bharat.checkpoints import CheckpointError, StoredTensor, is_checkpoint
from lightning_bharat.checkpoints.index import read_json
from lightning_bharat.checkpoints.opened import open_any

Weights = Mapping[str, Tensor | StoredTensor]

_PICKLES = (".bin", ".pt", ".pth", ".pkl")
_INDEX = ".safetensors.index.json"  # how the names of Hugging Face's lists of shards end


def read_weights(path: str | Path) -> dict[str, Tensor | StoredTensor]:
    """The tensors at ``path`` by name. They stay on disk until they are used, and no code from the file is run.

    Args:
        path: a ``.safetensors`` file, a folder of them (as Hugging Face's ``save_pretrained`` and ``bharat checkpoint
            export`` write: what its index lists, else ``model.safetensors``, else all of them), a Lightning ``.ckpt``,
            or a checkpoint directory. Links are followed, as Hugging Face's cache is made of them.

    Raises:
        CheckpointError: there is none of these, or it is damaged, or a pickle.
    """
    path = Path(path)
    if path.suffix in _PICKLES:
        raise _pickle(path)
    if not path.exists():
        raise CheckpointError(
            f"weights={str(path)!r} does not exist; write a .safetensors file, a folder of them, or a checkpoint (a "
            "name on a hub is not fetched: write the folder that huggingface_hub.snapshot_download returns)"
        )
    if path.suffix == ".safetensors":
        return {**_read_safetensors(path)}
    if path.is_dir() and not is_checkpoint(path):
        return _read_folder(path)
    return open_any(path).weights()


def hyper_parameters_of(path: str | Path) -> Any:
    """What the module was made with whose weights lie at ``path``; ``None`` for safetensors, which do not say.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    path = Path(path)
    if path.suffix == ".safetensors" or (path.is_dir() and not is_checkpoint(path)):
        return None
    return open_any(path).content.get("hyper_parameters")


def _read_folder(folder: Path) -> dict[str, Tensor | StoredTensor]:
    index = min(folder.glob(f"*{_INDEX}"), default=None)
    if index is not None:
        files = [folder / name for name in _listed(index)]
    elif (folder / "model.safetensors").exists():
        files = [folder / "model.safetensors"]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(file for file in folder.iterdir() if file.suffix in _PICKLES)
        if pickles:
            raise _pickle(pickles[0])
        raise CheckpointError(f"weights={str(folder)!r} is a folder without .safetensors files")
    found: dict[str, Tensor | StoredTensor] = {}
    for file in files:
        tensors = _read_safetensors(file)
        if twice := sorted(found.keys() & tensors.keys()):
            raise CheckpointError(
                f"weights={str(folder)!r}: {twice[0]} is in several files, of which one is {file.name}; write the path "
                "of the one that counts"
            )
        found.update(tensors)
    return found


def _listed(index: Path) -> list[str]:
    """The files that ``index`` lists, each once."""
    content = read_json(index)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise CheckpointError(f"{index} is damaged: it has no weight_map from names to files")
    files = sorted(set(places.values()))
    for file in files:
        if Path(file).name != file:
            raise CheckpointError(f"{index} names {file!r}, which is not in its folder")
        if not (index.parent / file).is_file():
            raise CheckpointError(
                f"{index.parent / file} is missing: {index.name} lists it, so this folder is an incomplete copy"
            )
    return files


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise CheckpointError(f"weights={str(file)!r} is no file")
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118, it is no dict
    except Exception as error:  # the library has an exception of its own for each way to be damaged
        raise CheckpointError(f"weights={str(file)!r} can't be read: {error}") from error


def _pickle(file: Path) -> CheckpointError:
    return CheckpointError(
        f"weights={str(file)!r} is a pickle, which may run code when it is read, and was not read. If you trust it, "
        "write it anew once: safetensors.torch.save_model(model, 'model.safetensors'), or "
        "model.save_pretrained(folder) of a Hugging Face model"
    )


def under(weights: Weights, prefix: str) -> dict[str, Tensor | StoredTensor]:
    """``weights`` with ``prefix`` once before each name, however often it was there.

    Hugging Face puts ``model.`` before all names but the head's, a LightningModule with ``self.model`` puts it before
    all, and one that holds a Hugging Face model before all twice.
    """
    again = re.compile(f"^(?:{re.escape(prefix)})*")
    return {again.sub(prefix, name): tensor for name, tensor in weights.items()}
