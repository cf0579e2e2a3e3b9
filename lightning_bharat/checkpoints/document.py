"""The part of a checkpoint that is no tensor of the model or the optimizers: `state.pt`, and what may be in it.

It is read with ``torch.load(weights_only=True)``, which builds plain data and tensors and nothing else. What it could
not build again is refused when the checkpoint is *written*, by its key: an unreadable one is found out too late.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_bharat.checkpoints.errors import CheckpointError
from lightning_bharat.checkpoints.share import Share

STATE = "state.pt"
MARK = "lightning_bharat.stored"  # {MARK: name} stands for a tensor that is stored in shares
PLAIN = (type(None), bool, int, float, complex, str, bytes)


def take_shares(tree: Any) -> tuple[Any, dict[str, Share]]:
    """``tree`` with a mark in the place of each :class:`Share` and ``DTensor``, and these by the names in the marks.

    A tensor is stored under its path in the tree; those of ``state_dict`` under their own names. The same ``Share``
    object at two places (tied weights) is stored once.
    """
    shares: dict[str, Share] = {}
    names: dict[int, str] = {}

    def take(node: Any, where: tuple[str, ...]) -> Any:
        if isinstance(node, DTensor):
            node = Share.of(node)
        if isinstance(node, Share):
            if id(node) not in names:
                name = "/".join(where[1:] if where[0] == "state_dict" else where)
                if name in shares:
                    raise CheckpointError(f"two tensors of the checkpoint would be named {name!r}; rename one")
                names[id(node)], shares[name] = name, node
            return {MARK: names[id(node)]}
        if isinstance(node, Mapping):
            return {key: take(value, (*where, str(key))) for key, value in node.items()}
        if type(node) in (list, tuple):
            return type(node)(take(value, (*where, str(i))) for i, value in enumerate(node))
        return node

    return take(tree, ()), shares


def put_back(tree: Any, stored: Callable[[str], Any]) -> Any:
    """``tree`` with ``stored(name)`` in the place of each mark: inverse of :func:`take_shares`."""
    if isinstance(tree, dict):
        if tree.keys() == {MARK}:
            return stored(tree[MARK])
        return {key: put_back(value, stored) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(put_back(value, stored) for value in tree)
    return tree


def as_plain(tree: Any, where: str = "checkpoint") -> Any:
    """``tree`` in types that can be read back without running code: paths become strings, numpy's numbers Python's,
    subclasses of ``dict`` (such as ``AttributeDict``) dicts.

    Raises:
        CheckpointError: an object that can't be; the message gives its key.
    """
    if type(tree) in PLAIN or type(tree) in (Tensor, torch.dtype, torch.device, torch.Size):
        return tree
    if isinstance(tree, torch.nn.Parameter):
        return tree.detach()
    if isinstance(tree, os.PathLike):
        return os.fspath(tree)
    if isinstance(tree, Mapping):
        return {as_plain(key, f"{where} key"): as_plain(value, f"{where}[{key!r}]") for key, value in tree.items()}
    if type(tree) in (list, tuple, set):
        return type(tree)(as_plain(value, f"{where}[{i}]") for i, value in enumerate(tree))
    if type(tree).__module__ == "numpy" and hasattr(tree, "item") and getattr(tree, "ndim", None) == 0:
        return as_plain(tree.item(), where)
    if not isinstance(tree, Enum) and _comes_back(tree):  # torch's own list of safe types, and what a user added to it
        return tree
    raise CheckpointError(
        f"{where} is a {type(tree).__module__}.{type(tree).__qualname__}, which can't be read back from a file without "
        f"running code; store numbers, strings, lists, dicts or tensors instead (for a hyperparameter: "
        f"save_hyperparameters(ignore=[...]))"
    )


def _comes_back(value: Any) -> bool:
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True, map_location="cpu")
    except Exception:
        return False
    return True


def state_bytes(tree: Any) -> bytes:
    """The content of `state.pt` for ``tree`` (of :func:`as_plain`)."""
    buffer = io.BytesIO()
    torch.save(tree, buffer)
    return buffer.getvalue()


def write_state(folder: Path, content: bytes) -> None:
    """Write what :func:`state_bytes` made to ``folder`` and bring it to disk."""
    with (folder / STATE).open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def read_state(folder: Path) -> dict[str, Any]:
    """The tree of :func:`state_bytes`. No code from the file is run.

    Raises:
        CheckpointError: it is missing, damaged, or holds objects other than plain data and tensors.
    """
    return safe_load(folder / STATE)


def safe_load(path: Path, mmap: bool = False, stand_ins: Mapping[str, type] | None = None) -> dict[str, Any]:
    """``torch.load(weights_only=True)`` on the CPU, with errors in words; see :func:`read_state`.

    Args:
        stand_ins: by the full names of classes that the file may hold, what is built in their place.
    """
    known: list[Any] = [(kind, name) for name, kind in (stand_ins or {}).items()]
    try:
        with torch.serialization.safe_globals(known):
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: {path.parent} is an incomplete copy of a checkpoint") from None
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is damaged, or holds objects that could run code when read, so it was not loaded: {_reason(error)}"
        ) from None
    except Exception as error:  # of another file torch reads any bytes, and fails in many ways
        why = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path} is damaged, or not a file of torch.save ({why})") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a {type(found).__name__} and not a checkpoint's dict")
    return found


def _reason(error: pickle.UnpicklingError) -> str:
    """In one line, without torch's advice to run the code."""
    words = str(error).rpartition("WeightsUnpickler error: ")[2]
    for advice in ("Please use", "Please file", "Check the documentation"):
        words = words.split(advice)[0]
    return " ".join(words.split())
