"""Copies of modules and of what they are called with, for runs that must leave the originals as they are."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

M = TypeVar("M", bound=nn.Module)


def copy_module(module: M, memo: dict[int, Any] | None = None) -> M:
    """A deep copy; attributes that can't be copied are the module's own in it.

    Those are locks and open files, and what holds one: a schedule's callable that LightningCLI made of a class path
    refers to everything else that the command has built.

    Args:
        module: to copy.
        memo: what stands for a part of it in the copy, by the part's ``id``, as for :func:`copy.deepcopy`.
    """
    known = memo or {}
    try:
        return deepcopy(module, dict(known))
    except Exception:
        values = [value for part in module.modules() for value in _attributes(part)]
        shared = {id(value): value for value in values if not _copies(value, known)}
        return deepcopy(module, {**shared, **known})


def _attributes(part: nn.Module) -> list[Any]:
    """What a copy of ``part`` alone is made of; a LightningModule leaves its trainer out."""
    reduced: Any = part.__reduce_ex__(4)  # how copy.deepcopy takes an object apart; its state is the third part
    return [value for name, value in reduced[2].items() if name not in ("_parameters", "_buffers", "_modules")]


def _copies(value: Any, known: dict[int, Any]) -> bool:
    try:
        deepcopy(value, dict(known))
    except Exception:
        return False
    return True


def without_cache(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of Hugging Face's blocks without their key-value cache, which would grow again in a second run."""
    empty = {name: None for name in ("cache", "past_key_values", "layer_past") if name in kwargs}
    return {**kwargs, **empty, **({"use_cache": False} if "use_cache" in kwargs else {})}  # type: ignore[dict-item]


def copy_around_tensors(x: Any, of_tensor: Callable[[Tensor], Tensor]) -> Any:
    """A deep copy of ``x`` with ``of_tensor(tensor)`` for each tensor in it (a key-value cache holds some).

    Returns:
        ``x`` itself if it can't be copied.
    """
    with _OfTensors(of_tensor), suppress(Exception):
        return deepcopy(x)
    return x


class _OfTensors(TorchFunctionMode):
    """What a deep copy takes for a tensor."""

    def __init__(self, of_tensor: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.of_tensor = of_tensor

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return self.of_tensor(args[0]) if func is Tensor.__deepcopy__ else func(*args, **(kwargs or {}))
