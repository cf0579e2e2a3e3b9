"""What was held when memory ran out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_bharat.health.leak import on_device, resident

# The first is torch's, of a device.
_KINDS = ("OutOfMemoryError", "MemoryError")
# What allocators of the host say, and CUDA's driver, in a RuntimeError.
_WORDS = ("can't allocate memory", "not enough memory", "Cannot allocate memory", "out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory ran out, on a device or on the host."""
    return any(says_out_of_memory(kind.__name__, str(error)) for kind in type(error).__mro__)


def says_out_of_memory(kind: str, message: str) -> bool:
    """The same of an exception that was raised in another process: by its class's name and its text."""
    return kind in _KINDS or (kind == "RuntimeError" and any(words in message for words in _WORDS))


def held(groups: Iterable[tuple[str, Iterable[Any]]], device: torch.device) -> str:
    """What takes how much, in words: each group of tensors by its name, and the whole process."""
    parts = [f"{name} {_gib(_bytes(tensors))}" for name, tensors in groups]
    parts.append(f"process {_gib(resident())}")
    if device.type != "cpu":
        parts.append(f"all tensors on {device} {_gib(on_device(device))}")
    return ", ".join(parts)


def _bytes(tensors: Iterable[Any]) -> int:
    """Storages once, however many tensors share them."""
    found = {}
    for tensor in tensors:
        if isinstance(tensor, Tensor) and not tensor.is_meta:
            local: Any = tensor.to_local() if hasattr(tensor, "to_local") else tensor
            found[local.untyped_storage().data_ptr()] = local.untyped_storage().nbytes()
    return sum(found.values())


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.1f} MiB"
