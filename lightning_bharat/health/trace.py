"""What each module of a step computed here, before ranks exchange anything, as one number each."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bharat.health.hooks import after_each, floats


class Trace:
    """Sums of outputs, in the order of the forward pass, and of their gradients, in that of the backward pass.

    Two traces of one step that differ were computed by a rank that makes errors: it is told apart from ranks that only
    got wrong gradients from others.
    """

    def __init__(self) -> None:
        self._sums: list[tuple[str, Tensor]] = []

    def watching(self, module: nn.Module) -> AbstractContextManager[None]:
        """Hooks on each module below ``module``, for as long as this lasts."""
        return after_each(module, self._ran)

    @torch.no_grad()
    def _ran(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        for tensor in floats(output):
            self._take(f"the output of {name}", tensor)
            if tensor.requires_grad:
                tensor.register_hook(partial(self._take, f"the gradient of the output of {name}"))

    @torch.no_grad()
    def _take(self, what: str, tensor: Tensor) -> None:
        self._sums.append((what, tensor.detach().sum(dtype=torch.float64)))

    def differs(self, other: Trace) -> str:
        """The first of what is not the same, in words; empty if all is."""
        for (what, mine), (_, theirs) in zip(self._sums, other._sums, strict=False):
            if not torch.equal(mine, theirs):
                return what
        return ""
