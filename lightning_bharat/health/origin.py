"""Which module made the first NaN or infinity, found while a step is run again: healthy steps have no hooks."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bharat.health.hooks import after_each, floats


class Origin:
    """Follows one run of a module's step, forward and backward.

    Attributes:
        words: who made the first value that is not finite, and how; empty if all were finite.
    """

    def __init__(self) -> None:
        self.words = ""
        self.forward = False
        self._last = ""

    def watching(self, module: nn.Module) -> AbstractContextManager[None]:
        """Hooks on each module below ``module``, for as long as this lasts. They change nothing that flows."""
        return after_each(module, self._ran)

    @torch.no_grad()
    def _ran(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = floats((args, kwargs))
        if not self.words and not all(map(is_finite, floats(output))):
            self.forward = True
            if not all(map(is_finite, given)):
                after = f"after {self._last}, " if self._last else ""
                self.words = f"{after}before {name}: what enters it is not finite already"
            elif bad := [key for key, p in module.named_parameters() if not p.is_meta and not is_finite(p)]:
                self.words = f"in the forward pass of {name}, whose {bad[0]} is not finite itself"
            else:
                self.words = f"in the forward pass of {name}: finite input, output that is not"
        self._last = name
        if torch.is_inference_mode_enabled():
            return
        came: list[bool] = []
        for tensor in floats(output):
            if tensor.requires_grad:
                tensor.register_hook(partial(self._came_back, came))
        for tensor in given:
            if tensor.requires_grad:
                tensor.register_hook(partial(self._went_on, name, came))

    def _came_back(self, came: list[bool], gradient: Tensor) -> None:
        came.append(is_finite(gradient))

    def _went_on(self, name: str, came: list[bool], gradient: Tensor) -> None:
        if not self.words and came and all(came) and not is_finite(gradient):
            self.words = f"in the backward pass of {name}: finite gradient of its output, none of its input"


def is_finite(tensor: Tensor) -> bool:
    """Whether all elements here are."""
    return bool(torch.isfinite(tensor.detach()).all())
