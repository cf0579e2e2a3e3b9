"""A batch that should not be trained on: numbers that are none, tokens that there are not, nothing at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import isfinite
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path, tree_leaves

from lightning_bharat.health.finding import Finding

IGNORED = -100  # labels that count for no loss
TOKENS = (torch.int64, torch.int32)
_WELL: tuple[bool | Tensor, Callable[[], str]] = (False, str)


class BatchCheck:
    """Looks at the tensors of a batch, where they are, and waits for no device.

    Args:
        vocab_size: whole numbers in tensors of two dimensions or more must be below it, and not negative, but for
            -100. ``None``: they are not looked at.
        mend: put what is in range into the place of what is not, in the batch itself, so that a step that will not
            count can be run.
    """

    def __init__(self, vocab_size: int | None, mend: bool) -> None:
        self.vocab_size, self._mend = vocab_size, mend

    def look(self, batch: Any, leaves: Sequence[Any] | None = None) -> tuple[bool | Tensor, Callable[[], str]]:
        """Whether it is bad, and what is, in words. On devices the first is still to be computed.

        Args:
            leaves: of ``batch``, where they are known.
        """
        leaves = tree_leaves(batch) if leaves is None else leaves
        flags: list[Tensor | bool] = [self._of(leaf) for leaf in leaves] if leaves else [True]
        bad = _any(flags)
        return _WELL if bad is False else (bad, partial(self._described, batch, flags))

    def _of(self, tensor: Any) -> Tensor | bool:
        if not isinstance(tensor, Tensor):
            return False
        if not tensor.numel():
            return True
        if tensor.is_floating_point():
            return self._of_numbers(tensor.detach())
        if (size := self.vocab_size) is None or tensor.dtype not in TOKENS or tensor.ndim < 2:
            return False
        # On the CPU most batches are done with by few operators: each costs more than its work on so few numbers.
        if tensor.is_cpu and (_fits(tensor, size) or _fits(tensor.masked_fill(tensor == IGNORED, 0), size)):
            return False
        return self._of_tokens(tensor, size)

    def _described(self, batch: Any, flags: list[Tensor | bool]) -> str:
        named = [(_name(path), leaf) for path, leaf in tree_flatten_with_path(batch)[0]]
        if not named:
            return "the batch: nothing in it"
        return "; ".join(f"{name}: {self._why(leaf)}" for (name, leaf), bad in zip(named, flags, strict=True) if bad)

    def _why(self, tensor: Tensor) -> str:
        if not tensor.numel():
            return "no elements"
        return "not finite" if tensor.is_floating_point() else f"outside of 0 to {(self.vocab_size or 0) - 1}"

    def _of_numbers(self, tensor: Tensor) -> Tensor | bool:
        total = tensor.sum(dtype=torch.float32)  # one of finite numbers that overflows is no good either
        bad = not isfinite(total.item()) if tensor.is_cpu else ~torch.isfinite(total)
        if self._mend and bad is not False:
            tensor.nan_to_num_(0.0, 0.0, 0.0)
        return bad

    def _of_tokens(self, tensor: Tensor, size: int) -> Tensor | bool:
        bad = ((tensor < 0) | (tensor >= size)) & (tensor != IGNORED)
        if self._mend:
            tensor.masked_fill_(bad, 0)
        return tensor.is_cpu or bad.any()


def of_loader(error: BaseException, batch_index: int) -> Finding | None:
    """If ``error`` comes out of a loader (here or in one of its workers): which batch could not be read, and why."""
    trace = error.__traceback__
    files = []
    while trace is not None:
        files.append((trace.tb_frame.f_code.co_filename, trace.tb_frame))
        trace = trace.tb_next
    if not any("torch/utils/data" in file for file, _ in files):
        return None
    indices = [frame.f_locals.get("possibly_batched_index") for file, frame in files if file.endswith("fetch.py")]
    samples = f" (samples {_few(indices[0])})" if indices and indices[0] is not None else ""
    kind, lines = type(error).__name__, str(error).strip().splitlines() or [""]
    words = f"the loader raised {kind} for batch {batch_index}{samples}: {lines[-1].removeprefix(f'{kind}: ')}"
    return Finding("loader", words, facts={"batch": batch_index})


def _few(indices: Any) -> str:
    every = list(indices) if isinstance(indices, (list, tuple)) else [indices]
    return ", ".join(map(str, every[:8])) + (f" and {len(every) - 8} more" if len(every) > 8 else "")


def _fits(tokens: Tensor, size: int) -> bool:
    least, most = tokens.aminmax()
    return least.item() >= 0 and most.item() < size


def _any(flags: list[Tensor | bool]) -> Tensor | bool:
    waiting = []
    for flag in flags:
        if flag is True:
            return True
        if flag is not False:
            waiting.append(flag)
    return torch.stack(waiting).any() if waiting else False


def _name(path: Any) -> str:
    return ".".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path) or "batch"
