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
PLAIN = frozenset({type(None), bool, int, float, complex, str, bytes})


def take_shares(tree: Any) -> tuple[Any, dict[str, Share]]:
    """``tree`` with a mark in the place of each :class:`Share` and ``DTensor``, and these by the names in the marks.

    A tensor is stored under its path in the tree; those of ``state_dict`` under their own names. The same ``Share``
    object at two places (tied weights) is stored once.
    """
    shares: dict[str, Share] = {}
    names: dict[int, str] = {}

    def take(node: Any, where: tuple[str, ...]) -> Any:
        if type(node) in PLAIN or type(node) is Tensor:
            return node
        if isinstance(node, DTensor):
            node = Share.of(node)
        if isinstance(node, Share):
            if id(node) not in names:
                name = "/".join(where[1:] if where[0] == "state_dict" else where)
                if name in shares:
                    raise CheckpointError(f"two tensors of the checkpoint would be named {name!r}; rename one")
                names[id(node)], shares[name] = name, node
            return {MARK: names[id(node)]}
        if type(node) is dict or isinstance(node, Mapping):
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


def as_plain(tree: Any, where: str = "checkpoint", copy: bool = False) -> Any:
    """``tree`` in types that can be read back without running code: paths become strings, numpy's numbers Python's,
    subclasses of ``dict`` (such as ``AttributeDict``) dicts.

    Args:
        where: what it is, for errors.
        copy: tensors are copied to host memory, and other objects are copied too, so that nothing changes it any more.

    Raises:
        CheckpointError: an object that can't be; the message gives its key.
    """
    kind = type(tree)
    if kind in PLAIN or kind in (torch.dtype, torch.device, torch.Size):
        return tree
    if kind is Tensor and copy:
        return tree.detach().to("cpu", copy=True).requires_grad_(tree.requires_grad)
    if kind is Tensor:
        return tree
    if kind is not dict and isinstance(tree, torch.nn.Parameter):
        return as_plain(tree.detach(), where, copy)
    if kind is not dict and isinstance(tree, os.PathLike):
        return os.fspath(tree)
    if kind is dict or isinstance(tree, Mapping):
        return {
            (key if type(key) is str else as_plain(key, f"{where} key")): (
                value if type(value) in PLAIN else as_plain(value, f"{where}[{key!r}]", copy)
            )
            for key, value in tree.items()
        }
    if kind in (list, tuple, set):
        if PLAIN.issuperset(map(type, tree)):  # thousands of numbers of a generator's state, for instance
            return kind(tree)
        return kind(as_plain(value, f"{where}[{i}]", copy) for i, value in enumerate(tree))
    if kind.__module__ == "numpy" and hasattr(tree, "item") and getattr(tree, "ndim", None) == 0:
        return as_plain(tree.item(), where)
    if not isinstance(tree, Enum):
        try:  # torch's own list of safe types, and what a user added to it
            found = state_of(state_bytes(tree))
            return found if copy else tree
        except Exception:  # torch's, pickle's, and the object's own
            pass
    raise CheckpointError(
        f"{where} is a {kind.__module__}.{kind.__qualname__}, which can't be read back from a file without "
        f"running code; store numbers, strings, lists, dicts or tensors instead (for a hyperparameter: "
        f"save_hyperparameters(ignore=[...]))"
    )


def state_bytes(tree: Any) -> bytes:
    """The content of `state.pt` for ``tree`` (of :func:`as_plain`)."""
    buffer = io.BytesIO()
    torch.save(tree, buffer)
    return buffer.getvalue()


def state_of(content: bytes) -> Any:
    """What :func:`state_bytes` was given. No code is run."""
    return torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")


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
