"""Runs of a person's step that are not part of training: what a step changes besides its gradients is put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torchmetrics import Metric

_LIGHTNINGS = frozenset(vars(pl.LightningModule()))  # attributes that every module has


@contextmanager
def unchanged(module: pl.LightningModule) -> Iterator[None]:
    """In here buffers, states of metrics, and the numbers, lists and dicts that ``module`` keeps as attributes may
    change; at the end they are as before."""
    kept = [(vars(module), key) for key in vars(module) if key not in _LIGHTNINGS]
    for part in module.modules():
        kept += [(part._buffers, key) for key in part._buffers]
        if isinstance(part, Metric):
            kept += [(vars(part), key) for key in vars(part)]
    before = [(where, key, where[key], _content(where[key])) for where, key in kept]
    try:
        yield
    finally:
        with torch.no_grad():
            for where, key, value, content in before:
                where[key] = _restored(value, content)


def _content(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return value.copy() if type(value) in (list, dict, set) else None


def _restored(value: Any, content: Any) -> Any:
    """``value``, the object that was there, with the content that it had."""
    if isinstance(value, Tensor):
        value.copy_(content)
    elif type(value) in (list, dict, set):
        value.clear()
        value.extend(content) if isinstance(value, list) else value.update(content)
    return value
